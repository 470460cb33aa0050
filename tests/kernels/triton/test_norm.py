"""The RMSNorm kernels against float64, and the values against the reference."""

import pytest
import torch

from qlora_kernels import add_rms_norm, rms_norm, rms_norm_reference
from tests.kernels.norms import assert_gradient_is_exact, sample
from tests.kernels.rows import DEVICE, GPU_DTYPES, assert_within, rounding, unwritten_is_nan, wide

EPS = 1e-5


def _assert_normed(y: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, *, unit_offset: bool) -> None:
    """Within float32's rounding of the sum, and two roundings to the dtype."""
    x, factor = wide(total, weight)
    factor += unit_offset
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    in_sum = (x.shape[-1] + 16) * torch.finfo(torch.float32).eps
    allowed = (unit.abs() * in_sum + rounding(y.dtype, unit)) * factor.abs() + rounding(y.dtype, unit * factor)
    assert_within(y, unit * factor, allowed * (1 + 2 * torch.finfo(y.dtype).eps))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 33), (33, 100), (3, 1000), (2, 4096)])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rows_and_their_gradients_are_those_of_float64(
    unit_offset: bool, dtype: torch.dtype, rows: int, width: int
) -> None:
    x, delta, weight = sample(rows, width, dtype, device=DEVICE)
    with unwritten_is_nan():
        y = rms_norm(x, weight, eps=EPS, unit_offset=unit_offset)
        _assert_normed(y, x, weight, unit_offset=unit_offset)
        total, y = add_rms_norm(x, delta, weight, eps=EPS, unit_offset=unit_offset)
        assert torch.equal(total, x + delta)
        _assert_normed(y, total, weight, unit_offset=unit_offset)
        assert_gradient_is_exact(x, delta, weight, eps=EPS, unit_offset=unit_offset)


def test_no_rows_give_no_rows() -> None:
    x = torch.zeros(0, 33, device=DEVICE, requires_grad=True)
    y = rms_norm(x, torch.ones(33, device=DEVICE), eps=EPS)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 33)


def test_what_the_kernel_does_not_serve_goes_through_torch() -> None:
    for dtype, width in ((torch.float64, 33), (torch.float32, 32_769)):
        x, _, weight = sample(2, width, dtype, device=DEVICE)
        assert torch.equal(rms_norm(x, weight, eps=EPS), rms_norm_reference(x, weight, eps=EPS))
