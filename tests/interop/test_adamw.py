"""Moments in 8 bits, against bitsandbytes' own."""

import bitsandbytes
import pytest
import torch
from torch import Tensor

from qlora_kernels.adamw import BLOCK, SIGNED_ZERO, Moments8, adamw_step, coefficients, moment_map

N = 40_000


def test_the_maps_of_both_moments_have_the_peers_bits() -> None:
    for signed in (True, False):
        theirs = bitsandbytes.functional.create_dynamic_map(signed=signed)
        assert torch.equal(moment_map(signed=signed, device=torch.device("cpu")).levels, theirs)


def gradients(steps: int, *, decades: int) -> list[Tensor]:
    """A trend for each parameter and noise around it, of sizes over so many decades."""
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (-3 - decades * torch.rand(N, generator=generator))
    trend = torch.randn(N, generator=generator)
    return [(trend + 2 * torch.randn(N, generator=generator)) * size for _ in range(steps)]


@pytest.mark.parametrize(("decades", "most"), [(0, 0.02), (1, 0.03), (2, 0.05), (4, 0.3)])
def test_the_error_of_8_bit_moments_is_within_the_peers(decades: int, most: float) -> None:
    start = torch.randn(N, generator=torch.Generator().manual_seed(1)) * 0.02
    exact, peers = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.1),
        bitsandbytes.optim.AdamW8bit([peers], lr=1e-3, weight_decay=0.1, min_8bit_size=0),
    ]
    ours = start.clone()
    codes = (torch.full((N,), SIGNED_ZERO, dtype=torch.uint8), torch.zeros(N, dtype=torch.uint8))
    moments = Moments8(*codes, *(torch.zeros(-(-N // BLOCK)) for _ in range(2)))
    for number, gradient in enumerate(gradients(40, decades=decades), 1):
        exact.grad, peers.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        by = coefficients(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, number=number)
        adamw_step(ours, gradient, moments, factor_1=torch.ones(()), by=by)
    moved = (exact - start).detach().norm()
    our_error, their_error = (float((found - exact).detach().norm() / moved) for found in (ours, peers))
    # Where no second moment is lost to zero the two are the same but for roundings.
    assert our_error <= 1.01 * their_error
    assert our_error < most
