"""Gated activations' samples and their bounds, for every way that they go."""

from functools import partial

import torch

from qlora_kernels import gated, geglu, swiglu
from tests.kernels.rows import assert_within, gradients, normal, rounding, wide

GATES = {"silu": swiglu, "gelu": geglu, "gelu_tanh": partial(geglu, approximate="tanh")}
_UNIT = torch.finfo(torch.float32).eps


def sample(rows: int, width: int, dtype: torch.dtype, *, device: object = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Gates of the usual size and large ones, on both sides."""
    gate = normal(rows, width, seed=1) * torch.tensor([1.0, 8.0, 30.0]).repeat(width)[:width]
    return gate.to(device=device, dtype=dtype), normal(rows, width, dtype=dtype, seed=2, device=device)


def assert_value_is_exact(gate: torch.Tensor, up: torch.Tensor, *, activation: gated.Activation) -> None:
    """Within float32's rounding inside, and two roundings to the dtype."""
    found = GATES[activation](gate, up)
    x, factor = wide(gate, up)
    value = gated.gated_reference(x, torch.ones_like(x), activation=activation)
    allowed = (_inside(x) + rounding(gate.dtype, value)) * factor.abs() + rounding(gate.dtype, value * factor)
    # The second rounding is of what the first may have enlarged.
    assert_within(found, value * factor, allowed * (1 + torch.finfo(gate.dtype).eps))


def assert_gradients_are_exact(gate: torch.Tensor, up: torch.Tensor, *, activation: gated.Activation) -> None:
    """As close as the dtype's roundings: at most three, each of half a unit."""
    gate.requires_grad_(), up.requires_grad_()
    y = GATES[activation](gate, up)
    dgate, dup = gradients([y], [gate, up])
    x, factor = wide(gate, up)
    (dy,) = wide(normal(*y.shape, seed=1, dtype=y.dtype))
    x.requires_grad_(), factor.requires_grad_()
    exact = torch.autograd.grad(gated.gated_reference(x, factor, activation=activation), (x, factor), dy)
    for found, wanted, outer in zip((dgate, dup), exact, (dy * factor, dy), strict=True):
        allowed = _inside(x) * outer.abs() + 3 * rounding(gate.dtype, wanted)
        # Subnormal roundings before a product are enlarged by it.
        allowed = allowed + rounding(gate.dtype, torch.zeros(())) * (outer.abs() + 1.2)
        assert_within(found, wanted, allowed.detach())


def _inside(x: torch.Tensor) -> torch.Tensor:
    """What float32 may miss of an activation or its slope.

    Of e^u, with u below 20 wherever the power counts, 2 + |u| units; slopes have terms up to 1 + |x|, of which
    subtractions leave less than they had.
    """
    return (32 + x.abs().clamp(max=20)) * _UNIT * (1 + x.abs().clamp(max=20))
