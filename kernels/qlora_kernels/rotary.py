"""Turn pairs of a head's components by their position's angle (rotary position embeddings, arXiv 2104.09864).

Shapes: x [B, H, T, D], cosines and sines [T, D], or [B, T, D] where each sequence has positions of its own. Component i
goes with i + D / 2:

    y[i] = x[i] * cos[i] - x[i + D/2] * sin[i]
    y[i + D/2] = x[i + D/2] * cos[i + D/2] + x[i] * sin[i + D/2]

each product and sum rounded to x's dtype. The gradient is turned by the negative angle; nothing but the tables is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from qlora_kernels import rows_cpu
from qlora_kernels.row_way import row_way


def rotate_reference(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """The meaning, in plain torch; the kernels have its bits."""
    cosines, sines = _over_heads(cosines), _over_heads(sines)
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, *, inplace: bool = False) -> Tensor:
    """Turn x [B, H, T, D] of any strides by tables [T, D] or [B, T, D] of its dtype; gives [B, H, T, D].

    With `inplace` the result takes x's memory, and the gradient of x that of the result's gradient. That is right where
    nobody else reads x, as a projection's fresh output, and the result goes to one reader, as attention. Autograd finds
    out where x was saved for a backward pass; a gradient that two readers share it does not.

    Raises ValueError for shapes that do not fit, an odd D, and a leaf that requires a gradient turned in place.
    """
    _check(x, cosines, sines, inplace=inplace)
    return _Rotate.apply(x, cosines, sines, inplace)  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor, inplace: bool) -> Tensor:
        ctx.tables, ctx.inplace = (cosines, sines), inplace
        return turned(x, cosines, sines, out=x.detach() if inplace else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        # An expanded gradient holds one number in many places.
        own = all(stride > 0 or size <= 1 for stride, size in zip(dy.stride(), dy.shape, strict=True))
        dx = turned(dy, *ctx.tables, back=True, out=dy if ctx.inplace and own else None)
        return dx, None, None, None


def turned(x: Tensor, cosines: Tensor, sines: Tensor, *, back: bool = False, out: Tensor | None = None) -> Tensor:
    """x turned, or with `back` the gradient turned back, without autograd; in `out` if given, which may be x."""
    x = x.detach()
    if out is None:
        out = torch.empty_like(x)
    way = row_way(x, cosines, sines, out)
    if x.stride(-1) != 1 or out.stride(-1) != 1:
        way = "torch"
    if way == "triton":
        # Imported here because Triton exists on Linux only and takes 0.4 s, which a run on a CPU need not pay.
        from qlora_kernels.rotary_triton import rotary_triton  # noqa: PLC0415

        rotary_triton(x, cosines.contiguous(), sines.contiguous(), back=back, out_BHTD=out)
    elif way == "c" and x.shape[-1] <= rows_cpu.WIDEST_HEAD:
        rows_cpu.rotary(x, cosines.contiguous(), sines.contiguous(), back=back, out_BHTD=out)
    else:
        out.copy_(_turned_back(x, cosines, sines) if back else rotate_reference(x, cosines, sines))
        return out
    if not out.is_inference():
        increment_version(out)
    return out


def _turned_back(dy: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = (dy * _over_heads(sines)).chunk(2, dim=-1)
    return dy * _over_heads(cosines) + torch.cat((second, -first), dim=-1)


def _over_heads(table: Tensor) -> Tensor:
    return table if table.ndim == 2 else table.unsqueeze(1)


def _check(x: Tensor, cosines: Tensor, sines: Tensor, *, inplace: bool) -> None:
    batch, _, tokens, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"pairs are turned, but a head of {head_dim} components has an odd one")
    for table in (cosines, sines):
        if tuple(table.shape) not in ((tokens, head_dim), (batch, tokens, head_dim)):
            raise ValueError(
                f"a table of shape {list(table.shape)} does not fit x of shape {list(x.shape)}:"
                f" {[tokens, head_dim]} and {[batch, tokens, head_dim]} do"
            )
    if cosines.shape != sines.shape:
        raise ValueError(f"cosines {list(cosines.shape)} and sines {list(sines.shape)} differ in shape")
    if inplace and x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise ValueError("a leaf that requires a gradient cannot be turned in place: call with inplace=False")
