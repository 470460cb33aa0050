"""Rotation: the bits of today's formula, in place or not, and the gradient's."""

from collections.abc import Iterator

import pytest
import torch

from qlora_kernels import cpu, rotate, rotate_reference
from tests.kernels.paths import DTYPES, forced
from tests.kernels.rotaries import assert_turns_as_the_reference, sample
from tests.kernels.rows import gradients, unwritten_is_nan


@pytest.fixture(params=cpu.paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param), unwritten_is_nan():
        yield request.param


@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per_row"])
@pytest.mark.parametrize("head_dim", [2, 6, 64, 128, 514])
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_bits_are_those_of_the_reference_both_ways(
    path: str, dtype: torch.dtype, tokens: int, head_dim: int, per_row: bool
) -> None:
    assert_turns_as_the_reference(*sample(tokens, head_dim, dtype, per_row=per_row))


def test_the_gradient_is_right_in_float64() -> None:
    x, cosines, sines = sample(3, 6, torch.float64, per_row=True)
    assert torch.autograd.gradcheck(lambda leaf: rotate(leaf, cosines, sines), x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_place_takes_the_memory_of_x_and_of_the_gradient(path: str, dtype: torch.dtype) -> None:
    x, cosines, sines = sample(7, 64, dtype)
    wanted = rotate_reference(x, cosines, sines)
    leaf = x.clone().requires_grad_()
    projected = leaf * 1
    turned = rotate(projected, cosines, sines, inplace=True)
    assert turned.data_ptr() == projected.data_ptr()
    assert torch.equal(turned, wanted)
    dy = torch.ones_like(turned)
    seen = []
    projected.register_hook(lambda dx: seen.append(dx.data_ptr()))
    turned.backward(dy)
    assert seen == [dy.data_ptr()]


def test_in_place_spares_a_gradient_that_is_one_number_in_many_places(path: str) -> None:
    x, cosines, sines = sample(7, 64, torch.float32)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    rotate(leaf * 1, cosines, sines, inplace=True).sum().backward()
    rotate_reference(other, cosines, sines).sum().backward()
    assert torch.equal(leaf.grad, other.grad)


def test_in_place_over_what_backward_needs_is_found_out(path: str) -> None:
    x, cosines, sines = sample(7, 64, torch.float32)
    squared = x.clone().requires_grad_().exp()
    turned = rotate(squared, cosines, sines, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        turned.sum().backward()


def test_in_place_works_without_gradients() -> None:
    x, cosines, sines = sample(7, 64, torch.float32)
    wanted = rotate_reference(x, cosines, sines)
    with torch.inference_mode():
        assert torch.equal(rotate(x.clone(), cosines, sines, inplace=True), wanted)
    with torch.no_grad():
        assert torch.equal(rotate(x, cosines, sines, inplace=True), wanted)


def test_nothing_is_kept_but_the_tables() -> None:
    kept = []
    x, cosines, sines = sample(7, 64, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        y = rotate(x.requires_grad_(), cosines, sines)
    assert kept == []
    assert gradients([y], [x])[0].shape == x.shape


def test_what_does_not_fit_is_refused() -> None:
    x, cosines, sines = sample(7, 64, torch.float32)
    with pytest.raises(ValueError, match=r"table of shape \[6, 64\] does not fit x"):
        rotate(x, cosines[:6], sines)
    with pytest.raises(ValueError, match="differ in shape"):
        rotate(x, cosines, sines.expand(x.shape[0], 7, 64))
    with pytest.raises(ValueError, match="odd one"):
        rotate(x[..., :63], cosines[:, :63], sines[:, :63])
    with pytest.raises(ValueError, match="leaf"):
        rotate(x.requires_grad_(), cosines, sines, inplace=True)
