"""AdamW over pages: torch's own bits however pages are cut; moments in 8 bits."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qlora_kernels.adamw import (
    BLOCK,
    SIGNED_ZERO,
    Coefficients,
    Moments8,
    Moments32,
    adamw_step,
    codes_of,
    coefficients,
    moment_map,
)

CPU = torch.device("cpu")
N = 50_021


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def step(number: int, *, weight_decay: float = 0.01, beta1: float = 0.9) -> Coefficients:
    return coefficients(lr=3e-3, betas=(beta1, 0.999), eps=1e-8, weight_decay=weight_decay, number=number)


def numbers(*, seed: int, scale: float = 1.0, n: int = N) -> Tensor:
    """Random numbers of many sizes, every seventh of them zero."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(n, generator=generator) * 10 ** (-4 * torch.rand(n, generator=generator)) * scale
    found[::7] = 0
    return found


def blank(n: int) -> Moments8:
    blocks = -(-n // BLOCK)
    codes = (torch.full((n,), SIGNED_ZERO, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8))
    return Moments8(*codes, torch.zeros(blocks), torch.zeros(blocks))


@pytest.mark.parametrize("cuts", [[], [1, 2, 19, 1000], [16, 256, 16384, 16385, 40_000], [49_999]], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("weight_decay", "beta1"), [(0.0, 0.9), (0.1, 0.3)])
def test_pages_cut_anywhere_have_the_bits_of_torchs_optimizer(
    cuts: list[int], threads: int, weight_decay: float, beta1: float
) -> None:
    torch.set_num_threads(threads)
    whole = torch.nn.Parameter(numbers(seed=0))
    theirs = torch.optim.AdamW(
        [whole], lr=3e-3, betas=(beta1, 0.999), weight_decay=weight_decay, foreach=False, fused=False
    )
    parameter, exp_avg, exp_avg_sq = numbers(seed=0), torch.zeros(N), torch.zeros(N)
    factor = torch.tensor(0.3)
    for number in range(1, 5):
        gradient = numbers(seed=number, scale=1e-3)
        whole.grad = gradient.clone().mul_(factor.item())
        theirs.step()
        before = gradient.clone()
        for start, stop in itertools.pairwise([0, *cuts, N]):
            page = slice(start, stop)
            moments = Moments32(exp_avg[page], exp_avg_sq[page])
            by = step(number, weight_decay=weight_decay, beta1=beta1)
            adamw_step(parameter[page], gradient[page], moments, factor_1=factor, by=by)
        assert torch.equal(parameter, whole.detach())
        assert torch.equal(exp_avg, theirs.state[whole]["exp_avg"])
        assert torch.equal(exp_avg_sq, theirs.state[whole]["exp_avg_sq"])
        assert torch.equal(gradient, before)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_factor_that_is_not_a_number_leaves_everything_as_it_is(bits: int) -> None:
    parameter, gradient = numbers(seed=0), numbers(seed=1)
    moments = Moments32(torch.zeros(N), torch.zeros(N)) if bits == 32 else blank(N)
    adamw_step(parameter, gradient, moments, factor_1=torch.tensor(1.0), by=step(1))
    held = [part.clone() for part in (parameter, *moments)]
    gradient[5] = math.inf
    adamw_step(parameter, gradient, moments, factor_1=torch.tensor(math.nan), by=step(2))
    assert all(torch.equal(part, before) for part, before in zip((parameter, *moments), held, strict=True))


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_gets_the_code_of_the_nearest_level_and_between_two_the_lower(signed: bool) -> None:
    values = moment_map(signed=signed, device=CPU)
    cuts = (values.levels[:-1] + values.levels[1:]) / 2
    if not signed:
        # What is above zero stays so.
        cuts[0] = 0
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    shares = [cuts, cuts.nextafter(up), cuts.nextafter(down), values.levels, numbers(seed=3).clamp(-1, 1)]
    shares += [torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0]), 10 ** (-9 * torch.rand(N))]
    shares = [torch.cat(shares), -torch.cat(shares)]
    found = codes_of(torch.cat(shares), values)
    assert torch.equal(found, torch.bucketize(torch.cat(shares), cuts, out_int32=True))
    assert torch.equal(codes_of(values.levels, values), torch.arange(256, dtype=torch.int32))
    assert values.levels[SIGNED_ZERO if signed else 0] == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_moments_in_8_bits_are_the_nearest_to_those_in_32_and_the_first_step_uses_them_unrounded(threads: int) -> None:
    torch.set_num_threads(threads)
    ours, theirs = numbers(seed=0), numbers(seed=0)
    gradient, narrow, wide = numbers(seed=1, scale=1e-3), blank(N), Moments32(torch.zeros(N), torch.zeros(N))
    adamw_step(ours, gradient, narrow, factor_1=torch.tensor(0.3), by=step(1))
    adamw_step(theirs, gradient, wide, factor_1=torch.tensor(0.3), by=step(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    for moment, codes, absmax, signed in (
        (wide.exp_avg, narrow.exp_avg_codes, narrow.exp_avg_absmax, True),
        (wide.exp_avg_sq, narrow.exp_avg_sq_codes, narrow.exp_avg_sq_absmax, False),
    ):
        largest = torch.nn.functional.pad(moment.abs(), (0, -N % BLOCK)).view(-1, BLOCK).amax(1)
        torch.testing.assert_close(absmax, largest, rtol=1e-6, atol=0)
        shares = moment / absmax.repeat_interleave(BLOCK)[:N]
        levels = moment_map(signed=signed, device=CPU).levels
        near = (shares[:, None] - levels[None, :]).abs().amin(1)
        lost = (levels[codes.int()] - shares).abs()
        # A second moment may be nearer to zero than to the lowest level, which it is given.
        assert ((lost <= near + 1e-7) | (~torch.tensor(signed) & (codes == 1) & (shares > 0))).all()
        assert lost.max() < 0.02


def test_moments_in_8_bits_of_blocks_cut_apart_are_those_of_the_whole() -> None:
    parts, whole = numbers(seed=0), numbers(seed=0)
    gradient, in_parts, at_once = numbers(seed=1), blank(N), blank(N)
    cut = 77 * BLOCK
    for number in (1, 2):
        for page, blocks in ((slice(0, cut), slice(0, 77)), (slice(cut, N), slice(77, None))):
            moments = Moments8(*(part[page] for part in in_parts[:2]), *(part[blocks] for part in in_parts[2:]))
            adamw_step(parts[page], gradient[page], moments, factor_1=torch.ones(()), by=step(number))
        adamw_step(whole, gradient, at_once, factor_1=torch.ones(()), by=step(number))
    assert torch.equal(parts, whole)
    assert all(torch.equal(one, other) for one, other in zip(in_parts, at_once, strict=True))


def test_a_block_of_zeros_stays_zero_in_8_bits() -> None:
    parameter, moments = torch.ones(300), blank(300)
    adamw_step(parameter, torch.zeros(300), moments, factor_1=torch.ones(()), by=step(1, weight_decay=0))
    assert torch.equal(parameter, torch.ones(300))
    assert all(torch.equal(part, before) for part, before in zip(moments, blank(300), strict=True))


def test_what_is_no_page_is_refused() -> None:
    flat, moments, factor = torch.zeros(10), Moments32(torch.zeros(10), torch.zeros(10)), torch.ones(())
    with pytest.raises(ValueError, match=r"given were float32 \[10\], float32 \[9\]"):
        adamw_step(flat, flat[:9], moments, factor_1=factor, by=step(1))
    with pytest.raises(ValueError, match=r"float32 \[10\], bfloat16 \[10\]"):
        adamw_step(flat, flat.bfloat16(), moments, factor_1=factor, by=step(1))
    with pytest.raises(ValueError, match=r"uint8 \[10\], uint8 \[10\], float32 \[1\], float32 \[1\], all contiguous"):
        adamw_step(flat, flat, Moments8(*blank(11)), factor_1=factor, by=step(1))
    with pytest.raises(ValueError, match="contiguous"):
        adamw_step(torch.zeros(20)[::2], flat, moments, factor_1=factor, by=step(1))
    with pytest.raises(ValueError, match="one float32 number"):
        adamw_step(flat, flat, moments, factor_1=torch.ones(2), by=step(1))
