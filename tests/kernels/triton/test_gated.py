"""The kernels of gated activations against float64."""

import pytest
import torch

from qlora_kernels import gated, swiglu
from tests.kernels.gates import GATES, assert_gradients_are_exact, assert_value_is_exact, sample
from tests.kernels.rows import DEVICE, GPU_DTYPES, gradients, normal, unwritten_is_nan


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 131), (33, 64)])
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_values_and_gradients_are_those_of_float64(
    dtype: torch.dtype, activation: gated.Activation, rows: int, width: int
) -> None:
    gate, up = sample(rows, width, dtype, device=DEVICE)
    with unwritten_is_nan():
        assert_value_is_exact(gate, up, activation=activation)
        assert_gradients_are_exact(gate, up, activation=activation)


def test_in_place_the_gradients_take_the_memory_of_gate_and_up() -> None:
    leaves = [part.requires_grad_() for part in sample(7, 131, torch.float32, device=DEVICE)]
    wanted = gradients([swiglu(*leaves)], leaves)
    gate, up = (leaf * 1 for leaf in leaves)
    y = swiglu(gate, up, inplace=True)
    dy = normal(7, 131, seed=1, device=DEVICE)
    found = torch.autograd.grad(y, [gate, up], dy, retain_graph=True)
    assert [part.data_ptr() for part in found] == [gate.data_ptr(), up.data_ptr()]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, [gate, up], dy)


def test_no_elements_give_none() -> None:
    gate = torch.zeros(0, 131, device=DEVICE, requires_grad=True)
    y = swiglu(gate, gate)
    y.sum().backward()
    assert y.shape == gate.grad.shape == (0, 131)
