"""The gate of a feed-forward layer (arXiv 2002.05202): y = activation(gate) * up.

gate, up and y are of one shape and dtype. Kept for backward: gate and up, from which the activation is computed again.

    dup = dy * activation(gate)
    dgate = dy * up * activation'(gate)

A bfloat16 has 65,536 values: on a CPU the activation of one is looked up, in a table that torch filled.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.nn import functional

from qlora_kernels import rows_cpu
from qlora_kernels.row_way import row_way

Activation = Literal["silu", "gelu", "gelu_tanh"]

_VALUES: Final[Mapping[Activation, Callable[[Tensor], Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
# (dy, x) -> dy * activation'(x), as autograd has it.
_SLOPES: Final[Mapping[Activation, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
}


def gated_reference(gate: Tensor, up: Tensor, *, activation: Activation) -> Tensor:
    """The meaning, in plain torch; on a CPU the kernels have its bits."""
    return _VALUES[activation](gate) * up


def swiglu(gate: Tensor, up: Tensor, *, inplace: bool = False) -> Tensor:
    """silu(gate) * up, of two tensors of one shape and dtype.

    With `inplace`, backward writes the gradients of gate and up over gate and up. That is right where nobody else reads
    them in backward, as two projections' outputs, and backward runs once: autograd refuses a second time. Raises
    ValueError where shapes or dtypes differ.
    """
    _check(gate, up)
    return _Gated.apply(gate, up, "silu", inplace)  # type: ignore[no-any-return, no-untyped-call]


def geglu(gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "none", inplace: bool = False) -> Tensor:
    """gelu(gate) * up, by erf or with `approximate="tanh"`; all else as `swiglu`."""
    _check(gate, up)
    activation = "gelu" if approximate == "none" else "gelu_tanh"
    return _Gated.apply(gate, up, activation, inplace)  # type: ignore[no-any-return, no-untyped-call]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation, inplace: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.inplace = activation, inplace
        return forward(gate, up, activation=activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        out = (gate.detach(), up.detach()) if ctx.inplace else None
        return *backward(dy, gate, up, activation=ctx.activation, out=out), None, None


def forward(gate: Tensor, up: Tensor, *, activation: Activation) -> Tensor:
    """activation(gate) * up without autograd."""
    gate, up = gate.detach(), up.detach()
    way = _way_of(gate, up)
    if way == "triton":
        # Imported here because Triton exists on Linux only and takes 0.4 s, which a run on a CPU need not pay.
        from qlora_kernels.gated_triton import gated_triton  # noqa: PLC0415

        return gated_triton(gate, up, activation=activation)
    if way == "c" and gate.dtype == torch.bfloat16:
        y = torch.empty_like(gate)
        rows_cpu.gated(gate, up, tables(activation)[0], y=y)
        return y
    # In float32 the exponential's last bit is torch's own.
    return _VALUES[activation](gate).mul_(up)


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, *, activation: Activation, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; in `out` if given, which may be gate and up themselves."""
    if out is None:
        out = torch.empty_like(gate), torch.empty_like(up)
    dy = dy.contiguous()
    way = _way_of(gate, up, dy, *out)
    if way == "triton":
        from qlora_kernels.gated_triton import gated_backward_triton  # noqa: PLC0415

        gated_backward_triton(dy, gate, up, activation=activation, out=out)
    elif way == "c" and (gate.dtype == torch.bfloat16 or activation != "gelu"):
        found = tables(activation) if gate.dtype == torch.bfloat16 else None
        rows_cpu.gated_backward(dy, gate, up, activation=activation, tables=found, out=out)
    else:
        dup = dy * _VALUES[activation](gate)
        out[0].copy_(_SLOPES[activation](dy * up, gate))
        out[1].copy_(dup)
        return out
    for written in out:
        if not written.is_inference():
            increment_version(written)
    return out


@cache
def tables(activation: Activation) -> tuple[Tensor, Tensor]:
    """The activation, rounded to bfloat16, and its slope, by the bits of a bfloat16: float32 [65536] each."""
    bits = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.uint16)
    x = bits.view(torch.bfloat16)
    slopes = _SLOPES[activation](torch.ones(1 << 16, dtype=torch.float64, device="cpu"), x.double())
    return _VALUES[activation](x).float(), slopes.float()


def _way_of(*tensors: Tensor) -> str:
    """Memory is walked through as it lies, so all must lie alike."""
    return row_way(*tensors) if all(tensor.is_contiguous() for tensor in tensors) else "torch"


def _check(gate: Tensor, up: Tensor) -> None:
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):
        raise ValueError(
            "gate and up are of one shape and dtype,"
            f" not {gate.dtype} {list(gate.shape)} and {up.dtype} {list(up.shape)}"
        )
