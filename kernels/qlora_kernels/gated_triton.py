"""activation(gate) * up on a GPU, and back: the kernels and their launchers. The meaning is in gated.py."""

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.variant import Variant

# Elements of one program, of four warps: 16 bytes of a 16-bit type per thread and load.
_TILE: Final = 1024
_OPTIONS: Final = {"num_warps": 4}
_ACTIVATIONS: Final = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit  # type: ignore[untyped-decorator]
def _sigmoid(x_N: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp(-x_N))


@triton.jit  # type: ignore[untyped-decorator]
def _value_and_slope(x_N: tl.tensor, ACTIVATION: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    if ACTIVATION == 1:
        # Half of 1 + erf(x / sqrt(2)) is the normal distribution's share below x, and its slope the bell.
        below_N = 0.5 + 0.5 * tl.erf(x_N * 0.7071067811865476)
        slope_N = below_N + x_N * 0.3989422804014327 * tl.exp(-0.5 * x_N * x_N)
        value_N = x_N * below_N
    else:
        # gelu's tanh formula is x * sigmoid(u) with u = 2 * sqrt(2 / pi) * (x + 0.044715 x^3); silu's u is x.
        if ACTIVATION == 2:
            share_N = _sigmoid(1.5957691216057308 * (x_N + 0.044715 * x_N * x_N * x_N))
            slope_of_u_N = 1.5957691216057308 * (1.0 + 0.134145 * x_N * x_N)
            slope_N = share_N + x_N * share_N * (1.0 - share_N) * slope_of_u_N
        else:
            share_N = _sigmoid(x_N)
            slope_N = share_N + x_N * share_N * (1.0 - share_N)
        value_N = x_N * share_N
    return value_N, slope_N


@triton.jit  # type: ignore[untyped-decorator]
def gated_kernel(  # noqa: PLR0917
    gate_N: tl.tensor, up_N: tl.tensor, y_N: tl.tensor, n: tl.tensor, TILE: tl.constexpr, ACTIVATION: tl.constexpr
) -> None:
    """One program computes TILE elements."""
    dtype = y_N.dtype.element_ty
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = place < n
    gate = tl.load(gate_N + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_N + place, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, ACTIVATION)
    # Rounded before it multiplies, as the meaning has it.
    tl.store(y_N + place, (value.to(dtype).to(tl.float32) * up).to(dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def gated_backward_kernel(  # noqa: PLR0917
    dy_N: tl.tensor,
    gate_N: tl.tensor,
    up_N: tl.tensor,
    dgate_N: tl.tensor,
    dup_N: tl.tensor,
    n: tl.tensor,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """dgate_N may be gate_N, and dup_N up_N: what a program writes, it alone has read."""
    dtype = dgate_N.dtype.element_ty
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = place < n
    dy = tl.load(dy_N + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_N + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_N + place, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(gate, ACTIVATION)
    tl.store(dup_N + place, (dy * value.to(dtype).to(tl.float32)).to(dtype), mask=inside)
    tl.store(dgate_N + place, (dy * up * slope).to(dtype), mask=inside)


def gated_triton(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """activation(gate) * up of contiguous tensors."""
    y = torch.empty_like(gate)
    n = gate.numel()
    if n:
        gated_kernel[(triton.cdiv(n, _TILE),)](
            gate, up, y, n, TILE=_TILE, ACTIVATION=_ACTIVATIONS[activation], **_OPTIONS
        )
    return y


def gated_backward_triton(dy: Tensor, gate: Tensor, up: Tensor, *, activation: str, out: tuple[Tensor, Tensor]) -> None:
    """The gradients of gate and up, written to `out`, which may be gate and up."""
    n = gate.numel()
    if n:
        gated_backward_kernel[(triton.cdiv(n, _TILE),)](
            dy, gate, up, *out, n, TILE=_TILE, ACTIVATION=_ACTIVATIONS[activation], **_OPTIONS
        )


def variants() -> Iterator[Variant]:
    """The forms that are launched, for ahead_of_time.py."""
    for dtype in ("fp32", "fp16", "bf16"):
        for activation in ("silu", "gelu", "gelu_tanh") if dtype == "bf16" else ("silu",):
            constants = {"TILE": _TILE, "ACTIVATION": _ACTIVATIONS[activation]}
            for name, kernel, tensors in (
                ("gated", gated_kernel, ("gate_N", "up_N", "y_N")),
                ("gated_backward", gated_backward_kernel, ("dy_N", "gate_N", "up_N", "dgate_N", "dup_N")),
            ):
                signature = dict.fromkeys(tensors, f"*{dtype}") | {"n": "i32"}
                yield Variant(f"{name}_{activation}_{dtype}", kernel, signature, constants, _OPTIONS, ("n",))
