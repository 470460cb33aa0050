"""RMSNorm's samples and its bound, for every way that it goes."""

import torch

from qlora_kernels import add_rms_norm, rms_norm
from tests.kernels.rows import assert_within, gradients, normal, rounding, wide

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sample(
    rows: int, width: int, dtype: torch.dtype, *, device: object = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, delta and weight."""
    x, delta = (normal(rows, width, dtype=dtype, seed=seed, device=device) for seed in (1, 2))
    return x, delta, normal(width, dtype=dtype, seed=3, device=device)


def assert_gradient_is_exact(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, *, eps: float, unit_offset: bool = False
) -> None:
    """Within float32's rounding of sums in any order, and one rounding to the dtype."""
    x.requires_grad_()
    y = rms_norm(x, weight, eps=eps, unit_offset=unit_offset)
    (dx,) = gradients([y], [x])
    (dy,) = wide(normal(*y.shape, seed=1, dtype=y.dtype))
    (factor,) = wide(weight)
    factor += unit_offset
    exact, allowed = _exact(*wide(x), factor, dy, eps)
    assert_within(dx, exact, allowed + rounding(x.dtype, exact))

    delta.requires_grad_()
    total, y = add_rms_norm(x, delta, weight, eps=eps, unit_offset=unit_offset)
    dx, ddelta = gradients([total, y], [x, delta])
    assert torch.equal(dx, ddelta)
    dtotal, dy = wide(*(normal(*y.shape, seed=seed, dtype=y.dtype) for seed in (1, 2)))
    exact, allowed = _exact(*wide(total), factor, dy, eps)
    exact = exact + dtotal
    allowed = allowed + torch.finfo(torch.float32).eps * exact.abs()
    assert_within(dx, exact, allowed + rounding(x.dtype, exact))


def _exact(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient in float64, and what float32 may miss: a sum loses half a unit of its terms' sizes with each."""
    root = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    g, unit = dy * weight, x * root
    exact = root * (g - unit * (g * unit).mean(-1, keepdim=True))
    sizes = root * (g.abs() + unit.abs() * (g * unit).abs().mean(-1, keepdim=True))
    return exact, (x.shape[-1] + 16) * torch.finfo(torch.float32).eps * sizes
