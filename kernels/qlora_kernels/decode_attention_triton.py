"""Attention of one new token on a GPU: the kernels and their launcher.

The meaning is `decode_attention.decode_attention_reference`. The cache is cut into chunks of N positions that many
programs take side by side; each leaves its own softmax's maximum, sum and mix, and a second kernel joins them in the
order of the chunks. N is fixed, so the result is the same whatever the capacity, and the same each time. There are as
many programs as chunks that a window can touch; the first takes the chunk in which the window begins.

Shape legend: see decode_attention.py. Besides: S chunks, P = D / 2 pairs, of which a head's components i and i + P are
one; G is padded to what a matrix product takes at least, P and D to powers of two.
"""

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.decode_attention import Rule
from qlora_kernels.variant import Variant

# Positions per program: few enough that a short text keeps many programs busy, enough to join with little work.
CHUNK: Final = 32
# Chunks that are joined at a time.
_JOINED: Final = 64
# What a matrix product takes at least of each side.
_LEAST_SIDE: Final = 16
# No fused multiply-add: torch rounds both products of a rotation.
OPTIONS: Final = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def _turned(x: tl.tensor, cosines: tl.tensor, other: tl.tensor, sines: tl.tensor) -> tl.tensor:
    """x * cosines + other * sines, each product and the sum rounded to x's type."""
    kind = x.dtype
    one = (x.to(tl.float32) * cosines.to(tl.float32)).to(kind)
    two = (other.to(tl.float32) * sines.to(tl.float32)).to(kind)
    return (one.to(tl.float32) + two.to(tl.float32)).to(kind)


@triton.jit  # type: ignore[untyped-decorator]
def _tanh(x: tl.tensor) -> tl.tensor:
    """In float32, as exact near 0, where 1 - exp(-2 x) has no digits left, as elsewhere."""
    square = x * x
    # Its series up to x^9; the next term is below half a unit in the last place of what is small.
    series = -0.05396825396825397 + square * 0.021869488536155203
    small = x + x * square * (-0.3333333333333333 + square * (0.13333333333333333 + square * series))
    shrunk = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(square < 0.0625, small, tl.where(x < 0.0, -large, large))


@triton.jit  # type: ignore[untyped-decorator]
def _first_chunk(position: tl.tensor, window: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """Where the chunk begins that holds the first position of the window."""
    return tl.maximum(position - window + 1, 0) // CHUNK * CHUNK


@triton.jit  # type: ignore[untyped-decorator]
def attend_kernel(  # noqa: PLR0917
    queries_BHD: tl.tensor,
    keys_BKD: tl.tensor,
    values_BKD: tl.tensor,
    cosines_D: tl.tensor,
    sines_D: tl.tensor,
    cached_keys_BKCD: tl.tensor,
    cached_values_BKCD: tl.tensor,
    position_1: tl.tensor,
    mixed_SHD: tl.tensor,
    tops_SH: tl.tensor,
    sums_SH: tl.tensor,
    queries_batch_stride: tl.tensor,
    queries_head_stride: tl.tensor,
    keys_batch_stride: tl.tensor,
    keys_head_stride: tl.tensor,
    values_batch_stride: tl.tensor,
    values_head_stride: tl.tensor,
    capacity: tl.tensor,
    window: tl.tensor,
    softcap: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    TURNS: tl.constexpr,
    CAPS: tl.constexpr,
) -> None:
    """One program: one chunk, one key head of one sequence, and the group of query heads that it serves.

    Without TURNS the tables are not looked at, without CAPS the softcap.
    """
    position = tl.load(position_1).to(tl.int32)
    first = _first_chunk(position, window, CHUNK) + tl.program_id(0) * CHUNK
    if first > position:
        return
    head, n_heads = tl.program_id(1), tl.num_programs(1)
    sequence = tl.program_id(2)
    PAIRS: tl.constexpr = SIZE // 2
    pair_P, member_G, row_N = tl.arange(0, PADDED_PAIRS), tl.arange(0, PADDED_GROUP), first + tl.arange(0, CHUNK)
    component_D = tl.arange(0, 2 * PADDED_PAIRS)
    real_P, real_D = pair_P < PAIRS, component_D < SIZE
    real_GP = (member_G < GROUP)[:, None] & real_P[None, :]

    queries = queries_BHD + sequence.to(tl.int64) * queries_batch_stride + head * GROUP * queries_head_stride
    query_GP = member_G[:, None] * queries_head_stride + pair_P[None, :]
    one_GP = tl.load(queries + query_GP, mask=real_GP, other=0.0)
    two_GP = tl.load(queries + query_GP + PAIRS, mask=real_GP, other=0.0)
    new_key = keys_BKD + sequence.to(tl.int64) * keys_batch_stride + head * keys_head_stride
    new_one_P = tl.load(new_key + pair_P, mask=real_P, other=0.0)
    new_two_P = tl.load(new_key + PAIRS + pair_P, mask=real_P, other=0.0)
    new_value = values_BKD + sequence.to(tl.int64) * values_batch_stride + head * values_head_stride
    new_value_D = tl.load(new_value + component_D, mask=real_D, other=0.0)
    if TURNS:
        cosine_one_P = tl.load(cosines_D + pair_P, mask=real_P, other=0.0)
        cosine_two_P = tl.load(cosines_D + PAIRS + pair_P, mask=real_P, other=0.0)
        sine_one_P = tl.load(sines_D + pair_P, mask=real_P, other=0.0)
        sine_two_P = tl.load(sines_D + PAIRS + pair_P, mask=real_P, other=0.0)
        old_GP, old_P = one_GP, new_one_P
        one_GP = _turned(one_GP, cosine_one_P[None, :], -two_GP, sine_one_P[None, :])
        two_GP = _turned(two_GP, cosine_two_P[None, :], old_GP, sine_two_P[None, :])
        new_one_P = _turned(new_one_P, cosine_one_P, -new_two_P, sine_one_P)
        new_two_P = _turned(new_two_P, cosine_two_P, old_P, sine_two_P)

    # 64 bits for where the cache of this head starts and the chunk in it, 32 within the chunk.
    start = ((sequence * n_heads + head).to(tl.int64) * capacity + first) * SIZE
    keys, values = cached_keys_BKCD + start, cached_values_BKCD + start
    if position < first + CHUNK:
        here = (position - first) * SIZE
        tl.store(keys + here + pair_P, new_one_P, mask=real_P)
        tl.store(keys + here + PAIRS + pair_P, new_two_P, mask=real_P)
        tl.store(values + here + component_D, new_value_D, mask=real_D)

    # The row that is being written is taken from where it was made, never from memory.
    inside_N = row_N > position - window
    old_N1, new_N1 = ((row_N < position) & inside_N)[:, None], (row_N == position)[:, None]
    key_NP = tl.arange(0, CHUNK)[:, None] * SIZE + pair_P[None, :]
    key_one_NP = tl.load(keys + key_NP, mask=old_N1 & real_P[None, :], other=0.0)
    key_two_NP = tl.load(keys + key_NP + PAIRS, mask=old_N1 & real_P[None, :], other=0.0)
    key_one_NP = tl.where(new_N1, new_one_P[None, :], key_one_NP)
    key_two_NP = tl.where(new_N1, new_two_P[None, :], key_two_NP)
    component_ND = tl.arange(0, CHUNK)[:, None] * SIZE + component_D[None, :]
    value_ND = tl.load(values + component_ND, mask=old_N1 & real_D[None, :], other=0.0)
    value_ND = tl.where(new_N1, new_value_D[None, :], value_ND)

    score_GN = tl.dot(one_GP, tl.trans(key_one_NP), input_precision="ieee")
    score_GN = tl.dot(two_GP, tl.trans(key_two_NP), score_GN, input_precision="ieee") * scale
    if CAPS:
        score_GN = _tanh(score_GN / softcap) * softcap
    score_GN = tl.where(((row_N <= position) & inside_N)[None, :], score_GN, float("-inf"))
    top_G = tl.max(score_GN, axis=1)
    weight_GN = tl.exp(score_GN - top_G[:, None])
    sum_G = tl.sum(weight_GN, axis=1)
    mixed_GD = tl.dot(weight_GN.to(value_ND.dtype), value_ND, input_precision="ieee")

    part = (tl.program_id(0) * tl.num_programs(2) + sequence) * n_heads * GROUP + head * GROUP + member_G
    tl.store(tops_SH + part, top_G, mask=member_G < GROUP)
    tl.store(sums_SH + part, sum_G, mask=member_G < GROUP)
    real_GD = (member_G < GROUP)[:, None] & real_D[None, :]
    tl.store(mixed_SHD + part.to(tl.int64)[:, None] * SIZE + component_D[None, :], mixed_GD, mask=real_GD)


@triton.jit  # type: ignore[untyped-decorator]
def join_kernel(  # noqa: PLR0917
    mixed_SHD: tl.tensor,
    tops_SH: tl.tensor,
    sums_SH: tl.tensor,
    position_1: tl.tensor,
    out_HD: tl.tensor,
    window: tl.tensor,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    JOINED: tl.constexpr,
) -> None:
    """One program joins the chunks of one head of one sequence."""
    head, n_heads = tl.program_id(0), tl.num_programs(0)
    position = tl.load(position_1).to(tl.int32)
    chunks = (position - _first_chunk(position, window, CHUNK)) // CHUNK + 1
    component_D = tl.arange(0, PADDED_SIZE)
    real_D = component_D < SIZE
    top, total = float("-inf"), 0.0
    mixed_D = tl.zeros((PADDED_SIZE,), dtype=tl.float32)
    for first in range(0, chunks, JOINED):
        chunk_S = first + tl.arange(0, JOINED)
        real_S = chunk_S < chunks
        part_S = chunk_S.to(tl.int64) * n_heads + head
        top_S = tl.load(tops_SH + part_S, mask=real_S, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(top_S, axis=0))
        weight_S = tl.exp(top_S - new_top)
        shrunk = tl.exp(top - new_top)
        total = total * shrunk + tl.sum(tl.load(sums_SH + part_S, mask=real_S, other=0.0) * weight_S, axis=0)
        mixed_SD = tl.load(
            mixed_SHD + part_S[:, None] * SIZE + component_D[None, :], mask=real_S[:, None] & real_D[None, :], other=0.0
        )
        mixed_D = mixed_D * shrunk + tl.sum(mixed_SD * weight_S[:, None], axis=0)
        top = new_top
    tl.store(out_HD + head * SIZE + component_D, (mixed_D / total).to(out_HD.dtype.element_ty), mask=real_D)


def decode_attention_triton(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    cached_keys: Tensor,
    cached_values: Tensor,
    position: Tensor,
    turns: tuple[Tensor, Tensor] | None,
    rule: Rule,
) -> Tensor:
    """Two launches; arguments and result as `decode_attention_reference`. The last dimension of each is contiguous."""
    n_batch, n_heads, _, size = queries.shape
    n_kv, capacity = cached_keys.shape[1:3]
    # A window as long as the cache is none.
    window = capacity if rule.window is None else min(rule.window, capacity)
    # All but its first position fill so many chunks, or begin one more.
    chunks = min(triton.cdiv(capacity, CHUNK), triton.cdiv(window - 1, CHUNK) + 1)
    mixed_SHD = torch.empty((chunks, n_batch * n_heads, size), dtype=torch.float32, device=queries.device)
    tops_SH, sums_SH = torch.empty((2, chunks, n_batch * n_heads), dtype=torch.float32, device=queries.device)
    out = torch.empty((n_batch, 1, n_heads * size), dtype=queries.dtype, device=queries.device)
    cosines, sines = (queries, queries) if turns is None else turns
    attend_kernel[(chunks, n_kv, n_batch)](
        queries,
        keys,
        values,
        # Without rotation the kernel reads neither.
        cosines,
        sines,
        cached_keys,
        cached_values,
        position,
        mixed_SHD,
        tops_SH,
        sums_SH,
        *(stride for part in (queries, keys, values) for stride in part.stride()[:2]),
        capacity,
        window,
        1.0 if rule.softcap is None else rule.softcap,
        rule.scale,
        **_sizes(n_heads // n_kv, size),
        CHUNK=CHUNK,
        TURNS=turns is not None,
        CAPS=rule.softcap is not None,
        **OPTIONS,
    )
    join_kernel[(n_batch * n_heads,)](
        mixed_SHD,
        tops_SH,
        sums_SH,
        position,
        out,
        window,
        SIZE=size,
        PADDED_SIZE=triton.next_power_of_2(size),
        CHUNK=CHUNK,
        JOINED=_JOINED,
        **OPTIONS,
    )
    return out


def _sizes(group: int, size: int) -> dict[str, int]:
    return {
        "GROUP": group,
        "SIZE": size,
        "PADDED_GROUP": max(_LEAST_SIDE, triton.next_power_of_2(group)),
        "PADDED_PAIRS": max(_LEAST_SIDE, triton.next_power_of_2(size // 2)),
    }


def variants() -> Iterator[Variant]:
    """The forms that are launched, for ahead_of_time.py."""
    for kind in ("fp32", "fp16", "bf16"):
        for group, size in ((1, 128), (4, 128), (8, 128), (8, 64)):
            yield _attend_variant(kind, group=group, size=size, caps=False)
        for group, size in ((2, 256), (2, 128)):
            yield _attend_variant(kind, group=group, size=size, caps=True)
        yield _join_variant(kind)


def _attend_variant(kind: str, *, group: int, size: int, caps: bool) -> Variant:
    tensors = [
        "queries_BHD",
        "keys_BKD",
        "values_BKD",
        "cosines_D",
        "sines_D",
        "cached_keys_BKCD",
        "cached_values_BKCD",
    ]
    strides = [f"{part}_{step}_stride" for part in ("queries", "keys", "values") for step in ("batch", "head")]
    signature = {
        **dict.fromkeys((*tensors, "cached_keys_BKCD", "cached_values_BKCD"), f"*{kind}"),
        "position_1": "*i64",
        **dict.fromkeys(("mixed_SHD", "tops_SH", "sums_SH"), "*fp32"),
        **dict.fromkeys(strides, "i32"),
        "capacity": "i32",
        "window": "i32",
        "softcap": "fp32",
        "scale": "fp32",
    }
    constants = {**_sizes(group, size), "CHUNK": CHUNK, "TURNS": True, "CAPS": caps}
    name = f"decode_attention_{kind}_group{group}_size{size}{'_capped' if caps else ''}"
    # A program of such large heads has as many bytes under way as two of others, so half as many programs will do.
    registers = 255 if size > 128 else 128
    return Variant(name, attend_kernel, signature, constants, OPTIONS, (*strides, "capacity", "window"), registers)


def _join_variant(kind: str) -> Variant:
    signature = {
        **dict.fromkeys(("mixed_SHD", "tops_SH", "sums_SH"), "*fp32"),
        "position_1": "*i64",
        "out_HD": f"*{kind}",
        "window": "i32",
    }
    constants = {"SIZE": 128, "PADDED_SIZE": 128, "CHUNK": CHUNK, "JOINED": _JOINED}
    return Variant(f"decode_attention_join_{kind}", join_kernel, signature, constants, OPTIONS)
