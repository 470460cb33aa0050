"""Pages through real streams: the same bits as without, and as little memory as was given."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_pipe.optim.lanes import CudaLanes
from qlora_pipe.optim.paged_adamw import PagedAdamW
from qlora_pipe.optim.pager import Moved
from qlora_pipe.optim.storage import Storage, memory_left, pinned_pages, storage_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SHAPES = ((64, 4096), (11008, 64), (64, 4001), (1,), (4096, 64))


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(1)
    return {
        f"layer.{i}": nn.Parameter(torch.randn(shape, generator=generator, device="cuda") * 0.02)
        for i, shape in enumerate(SHAPES)
    }


def trained(
    *, bits: int, budget: int | None, steps: int = 6, disturb: Callable[[], object] = lambda: None
) -> tuple[list[torch.Tensor], Moved, PagedAdamW]:
    """All parameters and states after some steps, what one step moved, and the optimizer."""
    named = parameters()
    storage = Storage(
        lanes=CudaLanes(torch.device("cuda")), backing=pinned_pages, budget=lambda: budget, largest_page=2**18
    )
    optimizer = PagedAdamW(named, betas=(0.9, 0.999), weight_decay=0.1, bits=bits, storage=storage)  # type: ignore[arg-type]
    moved = Moved()
    generator = torch.Generator("cuda").manual_seed(2)
    for number in range(1, steps + 1):
        for parameter in named.values():
            assert parameter.grad is not None
            parameter.grad.normal_(std=1e-2, generator=generator)
        disturb()
        moved = optimizer.step(lr=1e-3, number=number, factor=torch.full((), 0.7, device="cuda"))
        optimizer.zero_grad()
    saved = [tensor for name in named for _, tensor in optimizer.saved(name)]
    return [parameter.detach().cpu() for parameter in named.values()] + saved, moved, optimizer


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("budget", [0, 2**19, 2**21], ids=str)
def test_pages_through_streams_have_the_bits_of_no_pages(bits: int, budget: int) -> None:
    whole, none, _ = trained(bits=bits, budget=None)
    assert none == Moved()
    for _ in range(3):
        found, moved, optimizer = trained(bits=bits, budget=budget)
        assert moved.pages_in > 3
        assert optimizer.resident_bytes <= max(budget, 2**18)
        assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_a_busy_device_changes_no_bit() -> None:
    """The step is queued behind long work, so that copies could overtake it if nothing held them back."""
    a = torch.randn(4096, 4096, device="cuda")

    def busy() -> None:
        for _ in range(20):
            a @ a

    whole, _, _ = trained(bits=32, budget=None)
    found, _, _ = trained(bits=32, budget=0, disturb=busy)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_a_step_allocates_nothing_after_the_first() -> None:
    seen = []
    trained(bits=32, budget=2**19, disturb=lambda: seen.append(torch.cuda.memory_allocated()))
    assert len(set(seen[1:])) == 1


def test_what_is_left_is_less_than_what_is_free_and_a_budget_is_in_mib() -> None:
    device = torch.device("cuda")
    assert 0 <= memory_left(device) < torch.cuda.mem_get_info(device)[1]
    storage = storage_for(device, budget=3, scratch=Path("unused"))
    assert storage.budget() == 3 * 2**20
