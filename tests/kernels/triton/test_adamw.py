"""The AdamW kernels against torch's optimizer and the reference."""

import math

import pytest
import torch
from torch import Tensor

from qlora_kernels.adamw import (
    BLOCK,
    SIGNED_ZERO,
    Coefficients,
    Moments8,
    Moments32,
    adamw_8bit_reference,
    adamw_step,
    coefficients,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FACTOR = 0.3
# Numbers before and behind a page that no kernel may touch.
MARGIN = 64


def numbers(n: int, *, seed: int, scale: float) -> Tensor:
    """Random numbers of many sizes, every third of them zero."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(n, generator=generator) * 10 ** (-2 * torch.rand(n, generator=generator)) * scale
    found[::3] = 0
    return found


def step(number: int, *, weight_decay: float, beta1: float) -> Coefficients:
    return coefficients(lr=3e-3, betas=(beta1, 0.999), eps=1e-8, weight_decay=weight_decay, number=number)


class Fenced:
    """Tensors on the device, each with NaN (codes: 255) on both sides."""

    def __init__(self, *tensors: Tensor) -> None:
        self._wide = []
        for tensor in tensors:
            fence = 255 if tensor.dtype == torch.uint8 else math.nan
            wide = torch.full((tensor.numel() + 2 * MARGIN,), fence, dtype=tensor.dtype, device=DEVICE)
            wide[MARGIN:-MARGIN] = tensor
            self._wide.append(wide)

    @property
    def inside(self) -> list[Tensor]:
        return [wide[MARGIN:-MARGIN] for wide in self._wide]

    def assert_whole(self) -> None:
        for wide in self._wide:
            sides = torch.cat([wide[:MARGIN], wide[-MARGIN:]])
            assert bool((sides == 255).all() if wide.dtype == torch.uint8 else sides.isnan().all())


def units(found: Tensor, wanted: Tensor, before: Tensor) -> float:
    """The largest difference, in units in the last place of the number before or after, whichever is larger."""
    scale = torch.maximum(wanted.abs(), before.abs())
    unit = torch.nextafter(scale, torch.full_like(scale, math.inf)) - scale
    return float(((found.double() - wanted.double()).abs() / unit).max())


def unfused(parameter: Tensor, gradient: Tensor, moments: Moments32, by: Coefficients) -> tuple[Tensor, ...]:
    """What the kernel computes where a multiply-add rounds twice, as in the interpreter."""
    one, root = torch.tensor(1.0), torch.tensor(by.root)
    scaled = gradient * torch.tensor(FACTOR)
    if by.weight1 < 0.5:
        exp_avg = (scaled - moments.exp_avg) * by.weight1 + moments.exp_avg
    else:
        exp_avg = (moments.exp_avg - scaled) * (1 - by.weight1) + scaled
    exp_avg_sq = scaled * scaled * by.weight2 + moments.exp_avg_sq * by.beta2
    denominator = exp_avg_sq.double().sqrt().float() * (one / root) + by.eps
    return parameter * by.decay + exp_avg / denominator * -by.step_size, exp_avg, exp_avg_sq


@pytest.mark.parametrize("n", [1, 1023, 5021])
@pytest.mark.parametrize(("weight_decay", "beta1"), [(0.0, 0.9), (0.1, 0.3)])
def test_kernel_is_within_2_units_in_the_last_place_of_torch(n: int, weight_decay: float, beta1: float) -> None:
    theirs = torch.nn.Parameter(numbers(n, seed=0, scale=1).to(DEVICE))
    torchs = torch.optim.AdamW(
        [theirs], lr=3e-3, betas=(beta1, 0.999), weight_decay=weight_decay, foreach=False, fused=False
    )
    before = (theirs.detach().clone(), torch.zeros(n, device=DEVICE), torch.zeros(n, device=DEVICE))
    for number in range(1, 4):
        gradient, by = numbers(n, seed=number, scale=1e-2), step(number, weight_decay=weight_decay, beta1=beta1)
        page = Fenced(before[0], gradient, *before[1:])
        parameter, scaled, *moments = page.inside
        adamw_step(parameter, scaled, Moments32(*moments), factor_1=torch.tensor(FACTOR, device=DEVICE), by=by)
        page.assert_whole()
        found = (parameter, *moments)
        if CUDA:
            theirs.grad = gradient.to(DEVICE) * torch.tensor(FACTOR, device=DEVICE)
            torchs.step()
            state = torchs.state[theirs]
            wanted = (theirs.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone())
            assert max(units(*three) for three in zip(found, wanted, before, strict=True)) <= 2
        else:
            wanted = unfused(before[0], gradient, Moments32(*before[1:]), by)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        before = wanted


@pytest.mark.parametrize("n", [1, 255, 5021])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_kernel_for_8_bits_equals_the_reference(n: int, weight_decay: float) -> None:
    blocks = -(-n // BLOCK)
    parameter = numbers(n, seed=0, scale=1)
    moments = Moments8(
        torch.full((n,), SIGNED_ZERO, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8),
        torch.zeros(blocks), torch.zeros(blocks),
    )  # fmt: skip
    for number in range(1, 4):
        gradient, by = numbers(n, seed=number, scale=1e-2), step(number, weight_decay=weight_decay, beta1=0.9)
        # One block that never gets a gradient.
        gradient[BLOCK : 2 * BLOCK] = 0
        page = Fenced(parameter, gradient, *moments)
        ours, theirs, *parts = page.inside
        adamw_step(ours, theirs, Moments8(*parts), factor_1=torch.tensor(FACTOR, device=DEVICE), by=by)
        page.assert_whole()
        adamw_8bit_reference(parameter, gradient, moments, factor_1=torch.tensor(FACTOR), by=by)
        assert torch.equal(ours.cpu(), parameter)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(parts, moments, strict=True))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_factor_that_is_not_a_number_touches_nothing(bits: int) -> None:
    n = 1000
    flat = [numbers(n, seed=seed, scale=1) for seed in range(4)]
    if bits == 8:
        codes = [torch.randint(0, 256, (n,), dtype=torch.uint8) for _ in range(2)]
        flat = [*flat[:2], *codes, torch.rand(4), torch.rand(4)]
    page = Fenced(*flat)
    parameter, gradient, *moments = page.inside
    gradient[7] = math.inf
    skip = torch.tensor(math.nan, device=DEVICE)
    kind = Moments32 if bits == 32 else Moments8
    adamw_step(parameter, gradient, kind(*moments), factor_1=skip, by=step(3, weight_decay=0.1, beta1=0.9))
    page.assert_whole()
    assert torch.equal(parameter.cpu(), flat[0])
    assert all(torch.equal(part.cpu(), before) for part, before in zip(moments, flat[2:], strict=True))
