"""Products of a few rows with packed weights on a GPU: the kernels and their launcher.

The meaning is `quantized_matmul.quantized_matmul_reference`. Shapes: x [M, I], weights [O, I], outs [M, O]. A tile is R
rows of one weight; along a row it goes by chunks of W = 32 weights in P = 16 bytes, C chunks at a time. Up to four
weights go in one launch, first the tiles of one, then those of the next. One program sums up whole rows, so no order
of additions depends on what runs when.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.variant import Variant

MOST_ROWS: Final = 64
# Weights in one launch.
_WEIGHTS: Final = 4
_CHUNK: Final = 32
# Rows of x up to which each is multiplied by itself, in float32: with more, 16-bit rows go through the matrix units, of
# whose 16 rows most stay empty at first.
_VECTOR_ROWS: Final = {torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}
# What a GPU without matrix units that Triton uses takes, all by themselves.
_ROWS_WITHOUT_MATRIX_UNITS: Final = 8
_FIRST_WITH_MATRIX_UNITS: Final = (8, 0)
# Chunks in a tile for one row of x, and those of them along a row: each thread of four warps has 16 bytes of two rows.
_VECTOR_TILE: Final = 256
_VECTOR_CHUNKS: Final = 128
# Rows of a weight and chunks along them in a tile for tl.dot; half the rows where that leaves processors idle, and in
# float32, whose products take many registers.
_MATRIX_ROWS: Final = 32
_MATRIX_CHUNKS: Final = {torch.float32: 1, torch.float16: 4, torch.bfloat16: 4}
_ENOUGH_TILES: Final = 256
_NAMES: Final = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit  # type: ignore[untyped-decorator]
def _of_weight(which, of_0, of_1, of_2, of_3, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """What belongs to one of COUNT weights."""
    if COUNT > 1:
        of_0 = tl.where(which >= 1, of_1, of_0)
    if COUNT > 2:
        of_0 = tl.where(which >= 2, of_2, of_0)
    if COUNT > 3:
        of_0 = tl.where(which >= 3, of_3, of_0)
    return of_0


@triton.jit  # type: ignore[untyped-decorator]
def _scales(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    block, inside, absmax_S, nested_absmax_G, nested_levels_256, offset, nested_block_size, NESTED: tl.constexpr
):
    """The scale of each block, zero outside."""
    if NESTED:
        code = tl.load(absmax_S + block, mask=inside, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_G + block // nested_block_size, mask=inside, other=0.0)
        scale = tl.where(inside, tl.load(nested_levels_256 + code) * nested + tl.load(offset), 0.0)
    else:
        scale = tl.load(absmax_S + block, mask=inside, other=0.0)
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def _codes_of_words(word: tl.tensor) -> tl.tensor:
    """Eight codes for each word of the last axis, the first from the high nibble of the lowest byte, and so on."""
    firsts = tl.interleave(tl.interleave(word >> 4, word >> 20), tl.interleave(word >> 12, word >> 28))
    seconds = tl.interleave(tl.interleave(word, word >> 16), tl.interleave(word >> 8, word >> 24))
    return tl.interleave(firsts, seconds) & 15


@triton.jit  # type: ignore[untyped-decorator]
def quantized_matmul_kernel(  # noqa: PLR0917
    x_MI: tl.tensor,
    codes_0: tl.tensor,
    absmax_0: tl.tensor,
    levels_0: tl.tensor,
    nested_absmax_0: tl.tensor,
    nested_levels_0: tl.tensor,
    offset_0: tl.tensor,
    out_0: tl.tensor,
    rows_0: tl.tensor,
    codes_1: tl.tensor,
    absmax_1: tl.tensor,
    levels_1: tl.tensor,
    nested_absmax_1: tl.tensor,
    nested_levels_1: tl.tensor,
    offset_1: tl.tensor,
    out_1: tl.tensor,
    rows_1: tl.tensor,
    codes_2: tl.tensor,
    absmax_2: tl.tensor,
    levels_2: tl.tensor,
    nested_absmax_2: tl.tensor,
    nested_levels_2: tl.tensor,
    offset_2: tl.tensor,
    out_2: tl.tensor,
    rows_2: tl.tensor,
    codes_3: tl.tensor,
    absmax_3: tl.tensor,
    levels_3: tl.tensor,
    nested_absmax_3: tl.tensor,
    nested_levels_3: tl.tensor,
    offset_3: tl.tensor,
    out_3: tl.tensor,
    rows_3: tl.tensor,
    first_1: tl.tensor,
    first_2: tl.tensor,
    first_3: tl.tensor,
    length: tl.tensor,
    m: tl.tensor,
    nested_block_size: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
) -> None:
    """One program multiplies R rows of a weight with x.

    With M = 1 it takes one row of x, and multiplies in float32; else all, M or fewer, and its weights, rounded to x's
    dtype, go through tl.dot.
    """
    tile = tl.program_id(0)
    which = (tile >= first_1).to(tl.int32) + (tile >= first_2).to(tl.int32) + (tile >= first_3).to(tl.int32)
    codes_B = _of_weight(which, codes_0, codes_1, codes_2, codes_3, COUNT)
    absmax_S = _of_weight(which, absmax_0, absmax_1, absmax_2, absmax_3, COUNT)
    levels_16 = _of_weight(which, levels_0, levels_1, levels_2, levels_3, COUNT)
    nested_absmax_G = _of_weight(which, nested_absmax_0, nested_absmax_1, nested_absmax_2, nested_absmax_3, COUNT)
    nested_levels_256 = _of_weight(which, nested_levels_0, nested_levels_1, nested_levels_2, nested_levels_3, COUNT)
    offset = _of_weight(which, offset_0, offset_1, offset_2, offset_3, COUNT)
    out_MO = _of_weight(which, out_0, out_1, out_2, out_3, COUNT)
    rows = _of_weight(which, rows_0, rows_1, rows_2, rows_3, COUNT)
    first_row = (tile - _of_weight(which, 0, first_1, first_2, first_3, COUNT)) * R
    row_R = first_row + tl.arange(0, R)
    which_M = tl.program_id(1) + tl.arange(0, M)
    level_16 = tl.load(levels_16 + tl.arange(0, 16))
    if M == 1:
        x_MI += tl.program_id(1) * length
        # Each thread sums up its own chunks; only at the end the threads' sums come together.
        sums = tl.zeros((R, C), tl.float32)
    else:
        sums = tl.zeros((M, R), tl.float32)
    for start in range(0, tl.cdiv(length, 32), C):
        chunk_C = start + tl.arange(0, C)
        inside_RC = (row_R < rows)[:, None] & (chunk_C * 32 < length)[None, :]
        if ALIGNED:
            # 64 bits for where the tile starts, 32 within it.
            first_chunk = first_row.to(tl.int64) * (length // 32)
            chunk_RC = tl.arange(0, R)[:, None] * (length // 32) + chunk_C[None, :]
            block = (first_chunk + chunk_RC) * 32 // BLOCK_SIZE
            inside = inside_RC
            word_RC4 = (chunk_RC * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
            words_B = codes_B.to(tl.pointer_type(tl.int32)) + first_chunk * 4
            # Read once and never again: leave the cache to x and to the tables.
            word_RC4 = tl.load(words_B + word_RC4, mask=inside_RC[:, :, None], other=0, eviction_policy="evict_first")
            code_RCW = _codes_of_words(word_RC4)
        else:
            column_RCW = (chunk_C * 32)[None, :, None] + tl.arange(0, 32)[None, None, :]
            weight_RCW = row_R.to(tl.int64)[:, None, None] * length + column_RCW
            block = weight_RCW // BLOCK_SIZE
            inside = inside_RC[:, :, None] & (column_RCW < length)
            byte_RCW = tl.load(codes_B + weight_RCW // 2, mask=inside, other=0).to(tl.int32)
            code_RCW = tl.where(weight_RCW % 2 == 0, byte_RCW >> 4, byte_RCW & 15)
        # From shared memory, whose addresses take one instruction where those of a load take two.
        level_RCW = tl.reshape(tl.gather(level_16, tl.reshape(code_RCW, (R * C * 32,)), 0), (R, C, 32))
        scale = _scales(block, inside, absmax_S, nested_absmax_G, nested_levels_256, offset, nested_block_size, NESTED)
        if ALIGNED:
            # One scale serves a chunk.
            scale = scale[:, :, None]
        if M == 1:
            column_CW = (chunk_C * 32)[:, None] + tl.arange(0, 32)[None, :]
            x_CW = tl.load(x_MI + column_CW, mask=column_CW < length, other=0.0).to(tl.float32)
            if ALIGNED:
                sums += tl.sum(level_RCW * x_CW[None, :, :], axis=2) * tl.reshape(scale, (R, C))
            else:
                sums += tl.sum(level_RCW * scale * x_CW[None, :, :], axis=2)
        else:
            weight_RK = tl.reshape(level_RCW * scale, (R, C * 32)).to(x_MI.dtype.element_ty)
            column_K = start * 32 + tl.arange(0, C * 32)
            x_MK = tl.load(
                x_MI + which_M[:, None] * length + column_K[None, :],
                mask=(which_M < m)[:, None] & (column_K < length)[None, :],
                other=0.0,
            )
            sums = tl.dot(x_MK, tl.trans(weight_RK), acc=sums, input_precision="ieee")
    if M == 1:
        sums = tl.sum(sums, axis=1)[None, :]
    inside_MR = (which_M < m)[:, None] & (row_R < rows)[None, :]
    tl.store(out_MO + which_M[:, None] * rows + row_R[None, :], sums.to(out_MO.dtype.element_ty), mask=inside_MR)


def most_rows(device: torch.device) -> int:
    """Rows of x up to which this beats a dense product, of weights made dense for it."""
    return MOST_ROWS if _has_matrix_units(device) else _ROWS_WITHOUT_MATRIX_UNITS


def quantized_matmul_triton(x_MI: Tensor, weights: Sequence[QuantizedTensor], *, outs: Sequence[Tensor]) -> None:
    """Fill outs [M, O], all contiguous, in as few launches as the weights' forms allow."""
    for _, group in groupby(zip(weights, outs, strict=True), key=lambda pair: _form(pair[0])):
        pairs = list(group)
        for start in range(0, len(pairs), _WEIGHTS):
            _launch(x_MI, pairs[start : start + _WEIGHTS])


def _has_matrix_units(device: torch.device) -> bool:
    # In the interpreter both kinds of products can be tried.
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _FIRST_WITH_MATRIX_UNITS


def _form(q: QuantizedTensor) -> tuple[int, int, bool]:
    return q.block_size, q.nested_block_size, q.nested_absmax is not None


def _launch(x_MI: Tensor, pairs: Sequence[tuple[QuantizedTensor, Tensor]]) -> None:
    m, length = x_MI.shape
    block_size, nested_block_size, nested = _form(pairs[0][0])
    heights = [q.shape[0] for q, _ in pairs]
    # An allocation is at a multiple of 4, but a view of one need not be.
    aligned = _aligned(length, block_size) and all(q.codes.data_ptr() % 4 == 0 for q, _ in pairs)
    alone = m <= _VECTOR_ROWS[x_MI.dtype] or not _has_matrix_units(x_MI.device)
    constants, options = _sizes(m, length, sum(heights), x_MI.dtype, aligned=aligned, alone=alone)
    firsts, tiles = [], 0
    for height in heights:
        firsts.append(tiles)
        tiles += triton.cdiv(height, constants["R"])
    # A kernel for fewer weights never comes to the tiles of the others; which they are is of no matter.
    padded = [*pairs, *[pairs[-1]] * (_WEIGHTS - len(pairs))]
    firsts += [tiles] * (_WEIGHTS - len(pairs))
    quantized_matmul_kernel[(tiles, m if constants["M"] == 1 else 1)](
        x_MI,
        *(argument for q, out in padded for argument in _arguments(q, out)),
        *firsts[1:],
        length,
        m,
        nested_block_size,
        COUNT=len(pairs),
        BLOCK_SIZE=block_size,
        NESTED=nested,
        ALIGNED=aligned,
        **constants,
        **options,
    )


def _aligned(length: int, block_size: int) -> bool:
    return length % _CHUNK == 0 and block_size % _CHUNK == 0


def _arguments(q: QuantizedTensor, out: Tensor) -> tuple[Any, ...]:
    # Without double quantization the kernel reads none of the nested tables.
    nested = (q.absmax, q.levels, q.levels) if q.nested_absmax is None else (q.nested_absmax, q.nested_levels, q.offset)
    return q.codes, q.absmax, q.levels, *nested, out, q.shape[0]


def _sizes(
    m: int, length: int, rows: int, dtype: torch.dtype, *, aligned: bool, alone: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """The kernel's constants and options for m rows of x, each `alone` or together, and so many rows of weights."""
    chunks = triton.next_power_of_2(triton.cdiv(length, _CHUNK))
    if alone:
        tile = _VECTOR_TILE if aligned else _VECTOR_TILE // 4
        chunks = min(_VECTOR_CHUNKS, chunks, tile)
        return {"R": tile // chunks, "C": chunks, "M": 1}, {"num_warps": 4}
    chunks = min(chunks, _MATRIX_CHUNKS[dtype] if aligned else 1)
    fills = dtype != torch.float32 and rows >= _ENOUGH_TILES * _MATRIX_ROWS
    height = _MATRIX_ROWS if fills else _MATRIX_ROWS // 2
    return {"R": height, "C": chunks, "M": max(16, triton.next_power_of_2(m))}, {"num_warps": 4, "num_stages": 3}


def variants() -> Iterator[Variant]:
    """The forms that are launched, for ahead_of_time.py: of an 8B model's shapes, and one whose blocks cross rows."""
    for dtype in _NAMES:
        for m in (1, MOST_ROWS):
            yield _variant(dtype, m=m)
    for m in (1, 16):
        yield _variant(torch.bfloat16, m=m, count=1, nested=False)
        yield _variant(torch.bfloat16, m=m, length=4100)


def _variant(dtype: torch.dtype, *, m: int, count: int = 3, nested: bool = True, length: int = 4096) -> Variant:
    x = f"*{_NAMES[dtype]}"
    aligned = _aligned(length, 64)
    constants, options = _sizes(m, length, count * 4096, dtype, aligned=aligned, alone=m <= _VECTOR_ROWS[dtype])
    signature = {"x_MI": x}
    for i in range(_WEIGHTS):
        signature |= {
            f"codes_{i}": "*u8",
            f"absmax_{i}": "*u8" if nested else "*fp32",
            f"levels_{i}": "*fp32",
            f"nested_absmax_{i}": "*fp32",
            f"nested_levels_{i}": "*fp32",
            f"offset_{i}": "*fp32",
            f"out_{i}": x,
            f"rows_{i}": "i32",
        }
    signature |= dict.fromkeys(("first_1", "first_2", "first_3", "length", "m", "nested_block_size"), "i32")
    constants = {"COUNT": count, "BLOCK_SIZE": 64, "NESTED": nested, "ALIGNED": aligned, **constants}
    sizes = tuple(f"rows_{i}" for i in range(_WEIGHTS)) + (("length",) if aligned else ())
    name = (
        f"quantized_matmul_{_NAMES[dtype]}_m{m}_weights{count}"
        f"_{'double_quant' if nested else 'plain'}{'' if aligned else '_crossing'}"
    )
    # It keeps a row's running sums and the weights that meet them, and hides the memory's latency by long rows.
    most = 255
    return Variant(name, quantized_matmul_kernel, signature, constants, options, (*sizes, "nested_block_size"), most)
