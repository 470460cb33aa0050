"""What the tests of row-wise operations share: devices, outputs that must be written, and bounds on rounding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter cannot round to bfloat16.
GPU_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Have new memory hold NaN, so that what a kernel leaves out is seen."""
    makers = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def filled(name: str):
        def make(*arguments, **options) -> torch.Tensor:
            made = makers[name](*arguments, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return make

    with mock.patch.multiple(torch, **{name: filled(name) for name in makers}):
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: object = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers in float64, for a reference."""
    return [tensor.detach().cpu().double() for tensor in tensors]


def gradients(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], *, seed: int = 1) -> list[torch.Tensor]:
    """Gradients under random gradients of the outputs, each of which has its dtype and is the same for any device."""
    grads = [
        normal(*output.shape, seed=seed + number, dtype=output.dtype, device=output.device)
        for number, output in enumerate(outputs)
    ]
    return list(torch.autograd.grad(outputs, inputs, grads))


def rounding(dtype: torch.dtype, exact: torch.Tensor) -> torch.Tensor:
    """The most that rounding to a dtype moves a number, subnormal ones too."""
    info = torch.finfo(dtype)
    return exact.abs() * info.eps / 2 + info.tiny * info.eps


def assert_within(found: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor) -> None:
    """Every element as close to a float64 reference as its own bound says."""
    excess = (found.detach().cpu().double() - exact).abs() - allowed
    # Not `<= 0` on the largest: NaN would pass.
    assert (excess <= 0).all(), f"{(~(excess <= 0)).sum()} elements are off, the worst by {excess.max():.3g} too much"
