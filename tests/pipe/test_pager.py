"""Pages arrive before they are used and leave before they are overwritten, whatever the budget."""

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_pipe.optim.lanes import HostLanes, Lanes, Mark
from qlora_pipe.optim.pager import Moved, Pager
from tests.pipe.late_lanes import SPOILT, LateLanes

CPU = torch.device("cpu")
BYTES = 5


def host_pages(pages: int, page_bytes: int) -> list[torch.Tensor]:
    return [torch.zeros(page_bytes, dtype=torch.uint8) for _ in range(pages)]


def pager(pages: int, resident: int, lanes: Lanes) -> Pager:
    return Pager(pages=pages, page_bytes=BYTES, resident=resident, device=CPU, lanes=lanes, backing=host_pages)


@settings(deadline=None, max_examples=60)
@given(
    pages=st.integers(1, 9),
    resident=st.integers(1, 9),
    visits=st.integers(1, 4),
    between=st.booleans(),
    seed=st.integers(),
)
@example(pages=2, resident=1, visits=3, between=False, seed=0)
@example(pages=3, resident=2, visits=3, between=False, seed=0)
def test_every_page_is_changed_once_a_visit_and_nothing_is_lost(
    pages: int, resident: int, visits: int, between: bool, seed: int
) -> None:
    resident = min(resident, pages)
    lanes = LateLanes(random.Random(seed))
    paged = pager(pages, resident, lanes)
    for page in range(pages):
        paged.page(page).fill_(page)
    for visit in range(visits):
        seen = []
        for index, page in paged.visit():
            seen.append(index)
            assert page.tolist() == [index + 10 * visit] * BYTES
            page.add_(10)
            lanes.computed += 1
        assert seen == list(range(pages))
        if between:
            assert [paged.page(page).tolist() for page in range(pages)] == [
                [page + 10 * (visit + 1)] * BYTES for page in range(pages)
            ]
    assert [paged.page(page)[0] for page in range(pages)] == [page + 10 * visits for page in range(pages)]


@pytest.mark.parametrize(("resident", "moving"), [(1, 7), (2, 7), (3, 6), (6, 3), (7, 0)], ids=str)
def test_the_counters_and_the_memory_are_those_of_the_budget(resident: int, moving: int) -> None:
    paged = pager(7, resident, HostLanes())
    assert paged.resident_bytes == resident * BYTES
    before = paged.moved
    for _ in paged.visit():
        pass
    once = Moved(moving, moving, moving * BYTES, moving * BYTES)
    assert paged.moved.since(before) == once
    for _ in paged.visit():
        pass
    assert paged.moved == Moved(*(2 * count for count in once))


class Careless(LateLanes):
    """Lanes that forget one kind of order."""

    def __init__(self, forgets: str) -> None:
        super().__init__(random.Random(0))
        self._forgets = forgets

    def bring(self, buffer: torch.Tensor, source: torch.Tensor, *, after: Mark) -> Mark:
        return super().bring(
            buffer, source, after=self.mark() if self._forgets == "to wait for the way back" else after
        )

    def join(self, mark: Mark) -> None:
        if self._forgets != "to wait for what arrives":
            super().join(mark)


@pytest.mark.parametrize("forgets", ["nothing", "to wait for the way back", "to wait for what arrives"])
@pytest.mark.parametrize("resident", [1, 2, 4])
def test_the_stand_in_tells_a_wrong_order_from_a_right_one(forgets: str, resident: int) -> None:
    lanes = Careless(forgets)
    paged = pager(6, resident, lanes)
    for _ in range(3):
        for _, page in paged.visit():
            page.add_(1)
            lanes.computed += 1
    right = all(paged.page(page).tolist() == [3] * BYTES for page in range(6))
    assert right == (forgets == "nothing")


def test_work_that_is_not_done_before_the_way_back_is_noticed() -> None:
    lanes = LateLanes(random.Random(0))
    early = lanes.mark()
    lanes.computed += 1
    with pytest.raises(AssertionError, match="before the work on it is done"):
        lanes.write_back(torch.zeros(1), torch.zeros(1), after=early)


def test_no_visit_makes_the_host_wait() -> None:
    lanes = LateLanes(random.Random(0))
    paged = pager(6, 3, lanes)
    for _ in range(3):
        for _, page in paged.visit():
            assert SPOILT not in page
            lanes.computed += 1
    assert lanes.waits == 0
    paged.page(5)
    assert lanes.waits == 2
