"""The norm of a model: neutral when it is new, and the same whether its weight is frozen or trained."""

import pytest
import torch

from qlora_pipe.nn.norm import RMSNorm

OFFSETS = pytest.mark.parametrize("unit_offset", [False, True])


@OFFSETS
def test_a_new_norm_changes_nothing_but_the_length(unit_offset: bool) -> None:
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    y = RMSNorm(33, eps=1e-6, unit_offset=unit_offset)(x)
    torch.testing.assert_close(y, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


@OFFSETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_or_trained_a_norm_gives_the_same_bits(unit_offset: bool, dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(0)
    x, delta = torch.randn(2, 5, 33, generator=draws).to(dtype)
    norm = RMSNorm(33, eps=1e-6, unit_offset=unit_offset).to(dtype)
    torch.nn.init.normal_(norm.weight, generator=draws)
    trained = [norm(x), *norm.after_adding(x, delta)]
    norm.requires_grad_(False)
    frozen = [norm(x), *norm.after_adding(x, delta)]
    assert all(torch.equal(one, other) for one, other in zip(trained, frozen, strict=True))
    # With the offset, a weight of w is one of 1 + w in float32.
    if unit_offset and dtype == torch.float32:
        with torch.no_grad():
            other = RMSNorm(33, eps=1e-6)
            other.weight.copy_(1 + norm.weight)
            torch.testing.assert_close(other(x), norm(x), rtol=1e-6, atol=0)
