"""A weight in 4 bits made of random bytes: formats know no arithmetic."""

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor

from qlora_formats.layout import StorePlan, WeightPlan
from qlora_formats.store import StoredWeight

Value = StoredWeight | Tensor


def value_of(plan: StorePlan, weight: WeightPlan) -> Value:
    """The same random bytes for the same name, whenever it is asked for."""
    generator = torch.Generator().manual_seed(sum(weight.name.encode()))
    if not weight.quantized:
        return torch.randn(weight.shape, generator=generator).to(weight.dtype)
    n_weights = prod(weight.shape)
    n_blocks = -(-n_weights // plan.block_size)
    nested = plan.double_quant

    def packed(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    def real(count: int) -> Tensor:
        return torch.randn(count, generator=generator)

    return StoredWeight(
        codes=packed(-(-n_weights // 2)),
        absmax=packed(n_blocks) if nested else real(n_blocks),
        levels=real(16),
        nested_absmax=real(-(-n_blocks // 256)) if nested else None,
        nested_levels=real(256) if nested else None,
        offset=real(1)[0] if nested else None,
        block_size=plan.block_size,
        nested_block_size=256 if nested else 0,
        shape=weight.shape,
        kind=plan.kind,
        dtype=weight.dtype,
    )


@pytest.fixture
def values() -> Callable[[StorePlan], Callable[[str], Value]]:
    """Given a plan, what `write_store` asks for."""

    def of_plan(plan: StorePlan) -> Callable[[str], Value]:
        weights = {weight.name: weight for weight in plan.weights}
        return lambda name: value_of(plan, weights[name])

    return of_plan
