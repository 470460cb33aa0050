"""RMSNorm of rows on a GPU, alone or of a sum made in the same launch, and back: the kernels and their launchers.

The meaning is in norm.py, as is the shape legend. One program holds one row, its components in W places.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.variant import Variant


@triton.jit  # type: ignore[untyped-decorator]
def rms_norm_kernel(  # noqa: PLR0917
    x_TD: tl.tensor,
    delta_TD: tl.tensor,
    total_TD: tl.tensor,
    weight_D: tl.tensor,
    y_TD: tl.tensor,
    roots_T: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    ADDS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
) -> None:
    """Without ADDS, delta_TD and total_TD are not looked at."""
    row = tl.program_id(0).to(tl.int64)
    place_W = tl.arange(0, WIDTH)
    inside_W = place_W < width
    first = row * width
    x_W = tl.load(x_TD + first + place_W, mask=inside_W, other=0.0).to(tl.float32)
    if ADDS:
        delta_W = tl.load(delta_TD + first + place_W, mask=inside_W, other=0.0).to(tl.float32)
        total_W = (x_W + delta_W).to(total_TD.dtype.element_ty)
        tl.store(total_TD + first + place_W, total_W, mask=inside_W)
        x_W = total_W.to(tl.float32)
    root = 1.0 / tl.sqrt_rn(tl.sum(x_W * x_W, axis=0) / width + eps)
    tl.store(roots_T + row, root)
    weight_W = tl.load(weight_D + place_W, mask=inside_W, other=0.0).to(tl.float32)
    normed_W = x_W * root
    if UNIT_OFFSET:
        weight_W += 1.0
    else:
        # Rounded before the weight multiplies, as the meaning has it.
        normed_W = normed_W.to(y_TD.dtype.element_ty).to(tl.float32)
    tl.store(y_TD + first + place_W, (normed_W * weight_W).to(y_TD.dtype.element_ty), mask=inside_W)


@triton.jit  # type: ignore[untyped-decorator]
def rms_norm_backward_kernel(  # noqa: PLR0917
    dy_TD: tl.tensor,
    x_TD: tl.tensor,
    weight_D: tl.tensor,
    roots_T: tl.tensor,
    dtotal_TD: tl.tensor,
    dx_TD: tl.tensor,
    width: tl.tensor,
    WIDTH: tl.constexpr,
    ADDS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
) -> None:
    """Without ADDS, dtotal_TD is not looked at."""
    row = tl.program_id(0).to(tl.int64)
    place_W = tl.arange(0, WIDTH)
    inside_W = place_W < width
    first = row * width
    root = tl.load(roots_T + row)
    x_W = tl.load(x_TD + first + place_W, mask=inside_W, other=0.0).to(tl.float32) * root
    dy_W = tl.load(dy_TD + first + place_W, mask=inside_W, other=0.0).to(tl.float32)
    weight_W = tl.load(weight_D + place_W, mask=inside_W, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight_W += 1.0
    g_W = dy_W * weight_W
    dx_W = root * (g_W - x_W * (tl.sum(g_W * x_W, axis=0) / width))
    if ADDS:
        dx_W += tl.load(dtotal_TD + first + place_W, mask=inside_W, other=0.0).to(tl.float32)
    tl.store(dx_TD + first + place_W, dx_W.to(dx_TD.dtype.element_ty), mask=inside_W)


def rms_norm_triton(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, *, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (x itself without one), its norm, and the reciprocal roots [T] in float32."""
    rows, width = x_TD.shape
    y_TD, roots_T = torch.empty_like(x_TD), torch.empty(rows, dtype=torch.float32, device=x_TD.device)
    total_TD = x_TD if delta_TD is None else torch.empty_like(x_TD)
    if rows:
        rms_norm_kernel[(rows,)](
            x_TD,
            x_TD if delta_TD is None else delta_TD,
            total_TD,
            weight_D,
            y_TD,
            roots_T,
            width,
            eps,
            ADDS=delta_TD is not None,
            UNIT_OFFSET=unit_offset,
            **_form(width),
        )
    return total_TD, y_TD, roots_T


def rms_norm_backward_triton(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, roots_T: Tensor, dtotal_TD: Tensor | None, *, unit_offset: bool
) -> Tensor:
    """The gradient of x, `dtotal` added."""
    rows, width = x_TD.shape
    dx_TD = torch.empty_like(x_TD)
    if rows:
        rms_norm_backward_kernel[(rows,)](
            dy_TD,
            x_TD,
            weight_D,
            roots_T,
            x_TD if dtotal_TD is None else dtotal_TD,
            dx_TD,
            width,
            ADDS=dtotal_TD is not None,
            UNIT_OFFSET=unit_offset,
            **_form(width),
        )
    return dx_TD


def _form(width: int) -> dict[str, Any]:
    places = triton.next_power_of_2(width)
    # 16 components a thread, and from one warp to sixteen.
    return {"WIDTH": places, "num_warps": min(16, max(1, places // 512)), "enable_fp_fusion": False}


def variants() -> Iterator[Variant]:
    """The forms that are launched, for ahead_of_time.py."""
    forms = (
        ("fp32", True, False, 4096),
        ("fp16", True, False, 4096),
        ("bf16", True, False, 8192),
        ("bf16", False, False, 1024),
        ("bf16", True, True, 4096),
    )
    for dtype, adds, unit_offset, width in forms:
        form = _form(width)
        constants = {"WIDTH": form.pop("WIDTH"), "ADDS": adds, "UNIT_OFFSET": unit_offset}
        name = f"{'add_' if adds else ''}rms_norm_{'unit_offset_' if unit_offset else ''}{dtype}_width{width}"
        tensors = dict.fromkeys(("x_TD", "delta_TD", "total_TD", "weight_D", "y_TD"), f"*{dtype}")
        signature = tensors | {"roots_T": "*fp32", "width": "i32", "eps": "fp32"}
        yield Variant(name, rms_norm_kernel, signature, constants, form, ("width",))
        tensors = dict.fromkeys(("dy_TD", "x_TD", "weight_D", "roots_T", "dtotal_TD", "dx_TD"), f"*{dtype}")
        signature = tensors | {"roots_T": "*fp32", "width": "i32"}
        yield Variant(f"{name}_backward", rms_norm_backward_kernel, signature, constants, form, ("width",))
