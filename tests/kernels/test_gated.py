"""Gated activations: the bits of the plain formula, and gradients against float64."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from qlora_kernels import cpu, gated, geglu, swiglu
from tests.kernels.gates import GATES, assert_gradients_are_exact, sample
from tests.kernels.paths import DTYPES, forced
from tests.kernels.rows import gradients, unwritten_is_nan


@pytest.fixture(params=cpu.paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param), unwritten_is_nan():
        yield request.param


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_bits_are_those_of_the_plain_formula(path: str, dtype: torch.dtype, activation: str, rows: int) -> None:
    gate, up = sample(rows, 131, dtype)
    plain = {
        "silu": functional.silu(gate) * up,
        "gelu": functional.gelu(gate) * up,
        "gelu_tanh": functional.gelu(gate, approximate="tanh") * up,
    }
    assert torch.equal(GATES[activation](gate, up), plain[activation])


@pytest.mark.parametrize("activation", GATES)
def test_every_bfloat16_is_activated_as_torch_does(path: str, activation: gated.Activation) -> None:
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    up = torch.full_like(gate, -1.5)
    found, wanted = GATES[activation](gate, up), gated.gated_reference(gate, up, activation=activation)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_float64(path: str, dtype: torch.dtype, activation: str, rows: int) -> None:
    assert_gradients_are_exact(*sample(rows, 131, dtype), activation=activation)


@pytest.mark.parametrize("activation", GATES)
def test_the_gradient_is_right_in_float64(activation: str) -> None:
    gate, up = (part.requires_grad_() for part in sample(3, 5, torch.float64))
    assert torch.autograd.gradcheck(GATES[activation], (gate, up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_the_gradients_take_the_memory_of_gate_and_up(path: str, dtype: torch.dtype) -> None:
    leaves = [part.requires_grad_() for part in sample(7, 131, dtype)]
    wanted = gradients([swiglu(*leaves)], leaves)
    gate, up = (leaf * 1 for leaf in leaves)
    y = swiglu(gate, up, inplace=True)
    found = torch.autograd.grad(
        y, [gate, up], torch.randn(7, 131, generator=torch.Generator().manual_seed(1)).to(dtype)
    )
    assert [part.data_ptr() for part in found] == [gate.data_ptr(), up.data_ptr()]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_in_place_a_second_backward_is_refused(path: str) -> None:
    gate, up = (part.requires_grad_() * 1 for part in sample(7, 131, torch.float32))
    y = swiglu(gate, up, inplace=True).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_any_layout_will_do(path: str) -> None:
    gate, up = sample(7, 131, torch.bfloat16)
    leaves = [gate.T.requires_grad_(), up.T.requires_grad_()]
    y = geglu(*leaves)
    assert torch.equal(y, functional.gelu(gate.T) * up.T)
    found = torch.autograd.grad(y.sum(), leaves)
    wanted = torch.autograd.grad(geglu(*(leaf.contiguous() for leaf in leaves)).sum(), leaves)
    assert all((a - b).abs().max() < 0.02 for a, b in zip(found, wanted, strict=True))


def test_only_gate_and_up_are_kept() -> None:
    kept = []
    gate, up = (part.requires_grad_() for part in sample(7, 131, torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        swiglu(gate, up)
    assert [saved.data_ptr() for saved in kept] == [gate.data_ptr(), up.data_ptr()]


def test_what_does_not_fit_is_refused() -> None:
    gate, up = sample(7, 131, torch.float32)
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(gate, up[:1])
    with pytest.raises(ValueError, match="one shape and dtype"):
        geglu(gate, up.bfloat16())
