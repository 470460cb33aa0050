"""RMSNorm (arXiv 1910.07467) with a frozen weight, alone or of a residual sum made in the same pass.

Shapes: x and delta [..., D], weight [D]; T is the product of x's leading sizes.

    total = x + delta
    y = weight * round(total / sqrt(mean(total^2) + eps))

in float32, rounded to x's dtype before the weight multiplies. With a unit offset, as Gemma's checkpoints have it (arXiv
2403.08295), the weight is kept as its distance from one, and all is rounded once:

    y = round(total / sqrt(mean(total^2) + eps) * (1 + weight))

Kept for backward: total, and the reciprocal roots [T].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels import rows_cpu
from qlora_kernels.row_way import row_way

# Components of a row that one Triton program holds.
_WIDEST_ON_GPU = 32_768


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False) -> Tensor:
    """The meaning, in plain torch."""
    wide = x.to(torch.float32)
    return _weighted(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps), weight, x.dtype, unit_offset)


def _weighted(normed: Tensor, weight: Tensor, dtype: torch.dtype, unit_offset: bool) -> Tensor:
    if unit_offset:
        return (normed * (1.0 + weight.to(torch.float32))).to(dtype)
    return weight * normed.to(dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False) -> Tensor:
    """Scale each row of x [..., D] to a root mean square of one, then by `weight` [D]; gives [..., D].

    With `unit_offset` by 1 + weight. The weight is frozen: ValueError if it requires a gradient, or its size is not D.
    On a CPU the bits are those that `rms_norm_reference` gives for a contiguous x.
    """
    _check(x, weight)
    return _RmsNorm.apply(x, weight, eps, unit_offset)  # type: ignore[no-any-return, no-untyped-call]


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """x + delta and the norm of that, all [..., D]: a residual connection and the norm behind it, in one pass each way.

    Raises ValueError as `rms_norm`, and where x and delta differ in shape or dtype.
    """
    _check(x, weight)
    if (x.shape, x.dtype) != (delta.shape, delta.dtype):
        raise ValueError(f"cannot add {delta.dtype} {list(delta.shape)} to {x.dtype} {list(x.shape)} in one pass")
    return _AddRmsNorm.apply(x, delta, weight, eps, unit_offset)  # type: ignore[no-any-return, no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
        _, y, roots_T = forward(x, None, weight, eps=eps, unit_offset=unit_offset)
        ctx.save_for_backward(x, roots_T)
        ctx.weight, ctx.unit_offset = weight, unit_offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        x, roots_T = ctx.saved_tensors
        return backward(dy, x, ctx.weight, roots_T, None, unit_offset=ctx.unit_offset), None, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float, unit_offset: bool
    ) -> tuple[Tensor, Tensor]:
        total, y, roots_T = forward(x, delta, weight, eps=eps, unit_offset=unit_offset)
        ctx.save_for_backward(total, roots_T)
        ctx.weight, ctx.unit_offset = weight, unit_offset
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        total, roots_T = ctx.saved_tensors
        dx = backward(dy, total, ctx.weight, roots_T, dtotal, unit_offset=ctx.unit_offset)
        return dx, dx, None, None, None


def forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, *, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """total (x itself without a delta), y, and the reciprocal roots [T] in float32."""
    x_TD, delta_TD = _rows_of(x), None if delta is None else _rows_of(delta)
    way = row_way(x, weight) if delta is None else row_way(x, delta, weight)
    if way == "triton" and x_TD.shape[1] <= _WIDEST_ON_GPU:
        # Imported here because Triton exists on Linux only and takes 0.4 s, which a run on a CPU need not pay.
        from qlora_kernels.norm_triton import rms_norm_triton  # noqa: PLC0415

        total_TD, y_TD, roots_T = rms_norm_triton(x_TD, delta_TD, weight.contiguous(), eps=eps, unit_offset=unit_offset)
    elif way == "c" and rows_cpu.norms_as_torch_does(x_TD.shape[1]):
        total_TD, y_TD, roots_T = rows_cpu.rms_norm(
            x_TD, delta_TD, weight.contiguous(), eps=eps, unit_offset=unit_offset
        )
    else:
        total_TD = x_TD if delta_TD is None else x_TD + delta_TD
        wide_TD = total_TD.to(torch.float32)
        roots_T = torch.rsqrt(wide_TD.pow(2).mean(-1) + eps)
        y_TD = _weighted(wide_TD * roots_T[:, None], weight, x.dtype, unit_offset)
    return x if delta is None else total_TD.view(x.shape), y_TD.view(x.shape), roots_T


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, roots_T: Tensor, dtotal: Tensor | None, *, unit_offset: bool
) -> Tensor:
    """The gradient of x, whose other gradient `dtotal` is added in float32; rounded once, to x's dtype."""
    dy_TD, x_TD, dtotal_TD = _rows_of(dy), _rows_of(x), None if dtotal is None else _rows_of(dtotal)
    way = row_way(x, dy, weight) if dtotal is None else row_way(x, dy, weight, dtotal)
    width = x_TD.shape[1]
    if way == "triton" and width <= _WIDEST_ON_GPU:
        from qlora_kernels.norm_triton import rms_norm_backward_triton  # noqa: PLC0415

        dx_TD = rms_norm_backward_triton(dy_TD, x_TD, weight.contiguous(), roots_T, dtotal_TD, unit_offset=unit_offset)
    elif way == "c" and width <= rows_cpu.WIDEST_ROW:
        dx_TD = rows_cpu.rms_norm_backward(
            dy_TD, x_TD, weight.contiguous(), roots_T, dtotal_TD, unit_offset=unit_offset
        )
    else:
        wide_D, wide_TD = weight.to(torch.float32), x_TD.to(torch.float32)
        g_TD = dy_TD.to(torch.float32) * (1.0 + wide_D if unit_offset else wide_D)
        factors_T = (g_TD * wide_TD).mean(-1) * roots_T.square()
        dx_TD = roots_T[:, None] * g_TD.addcmul_(wide_TD, factors_T[:, None], value=-1)
        if dtotal_TD is not None:
            dx_TD += dtotal_TD
        dx_TD = dx_TD.to(x.dtype)
    return dx_TD.view(x.shape)


def _rows_of(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.requires_grad:
        raise ValueError("the weight of this norm is frozen: call requires_grad_(False) on it")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"a norm's weight of shape {list(weight.shape)} does not fit x of shape {list(x.shape)}")
