"""The rotation kernel against the reference, bit for bit."""

import pytest
import torch

from qlora_kernels import rotate
from tests.kernels.rotaries import assert_turns_as_the_reference, sample
from tests.kernels.rows import DEVICE, GPU_DTYPES, unwritten_is_nan


@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per_row"])
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 2), (7, 6), (3, 64), (2, 160)])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_the_bits_are_those_of_the_reference_both_ways(
    dtype: torch.dtype, tokens: int, head_dim: int, per_row: bool
) -> None:
    with unwritten_is_nan():
        assert_turns_as_the_reference(*sample(tokens, head_dim, dtype, per_row=per_row, device=DEVICE))


def test_more_heads_than_one_tile_holds_are_all_turned() -> None:
    x, cosines, sines = sample(2, 256, torch.float32, device=DEVICE)
    many = x.repeat(1, 7, 1, 1)
    assert torch.equal(rotate(many, cosines, sines), rotate(x, cosines, sines).repeat(1, 7, 1, 1))


def test_in_place_takes_the_memory_of_x_and_of_the_gradient() -> None:
    x, cosines, sines = sample(7, 64, torch.float32, device=DEVICE)
    projected = x.requires_grad_() * 1
    turned = rotate(projected, cosines, sines, inplace=True)
    assert turned.data_ptr() == projected.data_ptr()
    dy, seen = torch.ones_like(turned), []
    projected.register_hook(lambda dx: seen.append(dx.data_ptr()))
    turned.backward(dy)
    assert seen == [dy.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotate(x.exp(), cosines, sines, inplace=True).sum().backward()
