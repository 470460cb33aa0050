"""The optimizer gives the same bits however little memory it has."""

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora_pipe.optim.lanes import HostLanes, Lanes
from qlora_pipe.optim.layout import Layout, paged_layout
from qlora_pipe.optim.paged_adamw import PagedAdamW
from qlora_pipe.optim.pager import Moved
from qlora_pipe.optim.storage import Storage, mapped_pages, storage_for
from tests.pipe.late_lanes import LateLanes

CPU = torch.device("cpu")
SHAPES = ((3, 50), (64,), (300, 77), (1,), (5130,))
BETAS, DECAY = (0.9, 0.999), 0.1


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Lively(LateLanes):
    """Lanes that know that the optimizer computes with each page it is given."""

    def join(self, mark: object) -> None:
        super().join(mark)  # type: ignore[arg-type]
        self.computed += 1


def host_pages(pages: int, page_bytes: int) -> list[Tensor]:
    return [torch.zeros(page_bytes, dtype=torch.uint8) for _ in range(pages)]


def storage(budget: int | None, *, lanes: Lanes | None = None, largest_page: int = 2**20) -> Storage:
    return Storage(lanes=lanes or HostLanes(), backing=host_pages, budget=lambda: budget, largest_page=largest_page)


def parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {f"layer.{i}": nn.Parameter(torch.randn(shape, generator=generator)) for i, shape in enumerate(shapes)}


def gradients(named: dict[str, nn.Parameter], number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    return {name: torch.randn(parameter.shape, generator=generator) * 1e-2 for name, parameter in named.items()}


def steps(optimizer: PagedAdamW, named: dict[str, nn.Parameter], numbers: range) -> Moved:
    """Some updates, as backward and the loop make them; gives what the last one moved."""
    moved = Moved()
    for number in numbers:
        for name, gradient in gradients(named, number).items():
            found = named[name].grad
            assert found is not None
            found.add_(gradient)
        moved = optimizer.step(lr=1e-2 / number, number=number, factor=torch.tensor(0.7))
        optimizer.zero_grad()
    return moved


def states(optimizer: PagedAdamW, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {key: tensor for name in named for key, tensor in optimizer.saved(name)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def values(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def reference(
    bits: int, shapes: tuple[tuple[int, ...], ...] = SHAPES, *, last: int = 4
) -> tuple[dict[str, Tensor], ...]:
    """Parameters and states after some updates without pages."""
    named = parameters(shapes)
    optimizer = PagedAdamW(named, betas=BETAS, weight_decay=DECAY, bits=bits, storage=storage(None))  # type: ignore[arg-type]
    assert steps(optimizer, named, range(1, last + 1)) == Moved()
    return values(named), states(optimizer, named)


def test_without_pages_it_has_the_bits_of_torchs_optimizer() -> None:
    theirs = parameters()
    torchs = torch.optim.AdamW(theirs.values(), betas=BETAS, weight_decay=DECAY, foreach=False, fused=False)
    for number in range(1, 5):
        for name, gradient in gradients(theirs, number).items():
            theirs[name].grad = gradient * 0.7
        torchs.param_groups[0]["lr"] = 1e-2 / number
        torchs.step()
    found, saved = reference(32)
    assert equal(found, values(theirs))
    for name, parameter in theirs.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(saved[f"{moment}/{name}"], torchs.state[parameter][moment])


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([32, 8]),
    shapes=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=2).map(tuple), min_size=1, max_size=6).map(tuple),
    budget=st.integers(0, 200_000),
    largest_page=st.integers(1, 40_000),
    seed=st.integers(),
)
def test_any_budget_and_any_page_give_the_bits_of_no_pages(
    bits: int, shapes: tuple[tuple[int, ...], ...], budget: int, largest_page: int, seed: int
) -> None:
    named = parameters(shapes)
    kept = storage(budget, lanes=Lively(random.Random(seed)), largest_page=largest_page)
    optimizer = PagedAdamW(named, betas=BETAS, weight_decay=DECAY, bits=bits, storage=kept)  # type: ignore[arg-type]
    steps(optimizer, named, range(1, 4))
    wanted, wanted_states = reference(bits, shapes, last=3)
    assert equal(values(named), wanted)
    assert equal(states(optimizer, named), wanted_states)


@pytest.mark.parametrize("bits", [32, 8])
def test_one_page_is_enough_and_a_file_may_hold_the_rest(tmp_path: Path, bits: int) -> None:
    named = parameters()
    kept = storage_for(CPU, budget=0, scratch=tmp_path / "states")
    optimizer = PagedAdamW(named, betas=BETAS, weight_decay=DECAY, bits=bits, storage=kept)  # type: ignore[arg-type]
    assert optimizer.resident_bytes == 0
    moved = steps(optimizer, named, range(1, 5))
    assert moved.pages_in == moved.pages_out == -(-optimizer.state_bytes // optimizer.resident_bytes)
    assert moved.bytes_in == moved.bytes_out >= optimizer.state_bytes
    assert optimizer.resident_bytes < optimizer.state_bytes / 25
    wanted, wanted_states = reference(bits)
    assert equal(values(named), wanted)
    assert equal(states(optimizer, named), wanted_states)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("after", [0, 20_000, 60_000, None], ids=str)
@pytest.mark.parametrize("before", [0, 10_000, None], ids=str)
def test_states_saved_under_one_budget_go_on_under_another(bits: int, before: int | None, after: int | None) -> None:
    one, other = parameters(), parameters()
    first = PagedAdamW(one, betas=BETAS, weight_decay=DECAY, bits=bits, storage=storage(before))  # type: ignore[arg-type]
    steps(first, one, range(1, 3))
    second = PagedAdamW(other, betas=BETAS, weight_decay=DECAY, bits=bits, storage=storage(after))  # type: ignore[arg-type]
    saved = states(first, one)
    second.load(saved)
    # Nothing is lost where a run is stopped again before its first step.
    assert equal(states(second, other), saved)
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(one[name])
    steps(second, other, range(3, 5))
    wanted, wanted_states = reference(bits)
    assert equal(values(other), wanted)
    assert equal(states(second, other), wanted_states)
    second.load(saved)
    assert equal(states(second, other), saved)


def test_a_skipped_step_changes_nothing_wherever_the_pages_are() -> None:
    for budget in (0, None):
        named = parameters()
        optimizer = PagedAdamW(named, betas=BETAS, weight_decay=DECAY, storage=storage(budget))
        steps(optimizer, named, range(1, 3))
        before, before_states = values(named), states(optimizer, named)
        gradient = named["layer.2"].grad
        assert gradient is not None
        gradient[0] = math.inf
        optimizer.step(lr=1.0, number=3, factor=torch.tensor(math.nan))
        optimizer.zero_grad()
        assert not gradient.any()
        assert equal(values(named), before)
        assert equal(states(optimizer, named), before_states)


def test_parameters_and_gradients_stay_where_they_are_through_backward_and_step() -> None:
    named = parameters()
    optimizer = PagedAdamW(named, betas=BETAS, weight_decay=DECAY, storage=storage(0))
    places = [(parameter.data_ptr(), parameter.grad.data_ptr()) for parameter in named.values()]  # type: ignore[union-attr]
    for number in (1, 2):
        sum((parameter.square().sum() for parameter in named.values()), torch.zeros(())).backward()
        for parameter in named.values():
            torch.testing.assert_close(parameter.grad, 2 * parameter.detach())
        optimizer.step(lr=1e-2, number=number, factor=torch.ones(()))
        optimizer.zero_grad()
    assert places == [(p.data_ptr(), p.grad.data_ptr()) for p in named.values()]  # type: ignore[union-attr]
    # Rows of tensor cores and 16-byte loads want aligned tensors; blocks of 8-bit moments belong to one parameter.
    assert all((place - places[0][0]) % 1024 == 0 for place, _ in places)


def test_a_gradient_that_was_replaced_is_noticed() -> None:
    named = parameters()
    optimizer = PagedAdamW(named, betas=BETAS, weight_decay=DECAY, storage=storage(None))
    named["layer.1"].grad = torch.zeros(64)
    with pytest.raises(AssertionError, match=r"the gradient of layer\.1 was replaced"):
        optimizer.step(lr=1e-2, number=1, factor=torch.ones(()))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("numbers", [1024, 13 * 1024, 300 * 1024])
def test_every_field_of_every_page_begins_at_16_bytes(bits: int, numbers: int) -> None:
    for layout in (Layout(bits, numbers), paged_layout(bits, numbers, largest_page=50_000)):
        assert layout.page_bytes % 16 == 0
        page = torch.zeros(layout.page_bytes, dtype=torch.uint8)
        parts = layout.parts(page, layout.numbers)
        assert all((part.data_ptr() - page.data_ptr()) % 16 == 0 for part in parts)
        # The fields lie side by side and fill the page.
        assert sum(part.nbytes for part in parts) == layout.page_bytes
        for value, part in enumerate(parts):
            part.fill_(value + 1)
        assert [part.unique().tolist() for part in parts] == [[value + 1] for value in range(len(parts))]


def test_mapped_pages_are_zeros_of_their_own(tmp_path: Path) -> None:
    pages = mapped_pages(tmp_path / "states", 3, 1000)
    pages[1].fill_(7)
    assert [int(page.sum()) for page in pages] == [0, 7000, 0]
