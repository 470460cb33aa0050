"""Turn pairs of components by their position's angle on a GPU: the kernel and its launcher.

The meaning is in rotary.py, as is the shape legend; the bits are those of the reference. One program turns one token's
heads, H of them in a tile with P pairs each.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.variant import Variant

# Pairs in a tile, of four warps.
_TILE = 1024


@triton.jit  # type: ignore[untyped-decorator]
def rotary_kernel(  # noqa: PLR0917
    x_BHTD: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    out_BHTD: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    out_batch: tl.tensor,
    out_head: tl.tensor,
    out_token: tl.tensor,
    table_batch: tl.tensor,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    """out_BHTD may be x_BHTD: what a program writes, it alone has read."""
    dtype = out_BHTD.dtype.element_ty
    row = tl.program_id(0)
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    pair_P = tl.arange(0, PAIRS)
    head_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    in_table_P = pair_P < half
    inside_HP = (head_H < heads)[:, None] & in_table_P[None, :]

    table = batch * table_batch + token * 2 * half
    cos_left_P = tl.load(cosines + table + pair_P, mask=in_table_P, other=0.0).to(tl.float32)
    cos_right_P = tl.load(cosines + table + half + pair_P, mask=in_table_P, other=0.0).to(tl.float32)
    sin_left_P = tl.load(sines + table + pair_P, mask=in_table_P, other=0.0).to(tl.float32)
    sin_right_P = tl.load(sines + table + half + pair_P, mask=in_table_P, other=0.0).to(tl.float32)

    x_HP = x_BHTD + batch * x_batch + token * x_token + head_H.to(tl.int64)[:, None] * x_head + pair_P[None, :]
    left_HP = tl.load(x_HP, mask=inside_HP, other=0.0).to(tl.float32)
    right_HP = tl.load(x_HP + half, mask=inside_HP, other=0.0).to(tl.float32)
    # Each product is rounded, as torch's is.
    left_cos_HP = (left_HP * cos_left_P[None, :]).to(dtype).to(tl.float32)
    right_cos_HP = (right_HP * cos_right_P[None, :]).to(dtype).to(tl.float32)
    if BACK:
        left_HP, right_HP = (
            left_cos_HP + (right_HP * sin_right_P[None, :]).to(dtype).to(tl.float32),
            right_cos_HP - (left_HP * sin_left_P[None, :]).to(dtype).to(tl.float32),
        )
    else:
        left_HP, right_HP = (
            left_cos_HP - (right_HP * sin_left_P[None, :]).to(dtype).to(tl.float32),
            right_cos_HP + (left_HP * sin_right_P[None, :]).to(dtype).to(tl.float32),
        )
    out_HP = (
        out_BHTD + batch * out_batch + token * out_token + head_H.to(tl.int64)[:, None] * out_head + pair_P[None, :]
    )
    tl.store(out_HP, left_HP.to(dtype), mask=inside_HP)
    tl.store(out_HP + half, right_HP.to(dtype), mask=inside_HP)


def rotary_triton(x_BHTD: Tensor, cosines: Tensor, sines: Tensor, *, back: bool, out_BHTD: Tensor) -> None:
    """Turn x into out, which may be x. Strides are any but the components', which is 1; tables are contiguous."""
    batch, heads, tokens, head_dim = x_BHTD.shape
    if x_BHTD.numel() == 0:
        return
    form = _form(heads, head_dim)
    rotary_kernel[(batch * tokens, triton.cdiv(heads, form["HEADS"]))](
        x_BHTD,
        cosines,
        sines,
        out_BHTD,
        tokens,
        heads,
        head_dim // 2,
        *(x_BHTD.stride(dim) for dim in (0, 1, 2)),
        *(out_BHTD.stride(dim) for dim in (0, 1, 2)),
        tokens * head_dim if cosines.ndim == 3 else 0,
        BACK=back,
        **form,
    )


def _form(heads: int, head_dim: int) -> dict[str, Any]:
    pairs = triton.next_power_of_2(head_dim // 2)
    tile = max(1, min(triton.next_power_of_2(heads), _TILE // pairs))
    # A fused multiply-add would round once where the meaning rounds twice.
    return {"HEADS": tile, "PAIRS": pairs, "num_warps": 4, "enable_fp_fusion": False}


def variants() -> Iterator[Variant]:
    """The forms that are launched, for ahead_of_time.py."""
    sizes = ("tokens", "heads", "half")
    strides = ("x_batch", "x_head", "x_token", "out_batch", "out_head", "out_token", "table_batch")
    for dtype in ("fp32", "fp16", "bf16"):
        for back in (False, True) if dtype == "bf16" else (False,):
            signature = dict.fromkeys(("x_BHTD", "cosines", "sines", "out_BHTD"), f"*{dtype}")
            signature |= dict.fromkeys((*sizes, *strides), "i32")
            form = _form(32, 128)
            constants = {"HEADS": form.pop("HEADS"), "PAIRS": form.pop("PAIRS"), "BACK": back}
            name = f"rotary_{'back_' if back else ''}{dtype}_head128"
            yield Variant(name, rotary_kernel, signature, constants, form, ("half", *strides))
