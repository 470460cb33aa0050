"""Work done ahead: in order, within its budget, and ended cleanly."""

import threading
import time
import weakref
from collections.abc import Callable

import pytest

from qlora_formats.ahead import in_order


class Result:
    """Something that can be seen to be let go."""

    def __init__(self, item: int) -> None:
        self.item = item


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("budget", [0, 3, 100])
def test_results_come_in_order_whatever_finishes_first(budget: int, threads: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (7 - item % 7))
        return item * item

    found = list(in_order(range(23), work, cost=lambda _: 1, budget=budget, threads=threads))
    assert found == [item * item for item in range(23)]


def test_what_is_begun_never_costs_more_than_the_budget_and_one_dear_item_passes() -> None:
    costs = [1, 2, 9, 1, 1, 1, 5, 3, 2, 2]
    begun: list[int] = []
    lock = threading.Lock()
    given_back = 0

    def work(item: int) -> int:
        with lock:
            begun.append(item)
            held = sum(costs[one] for one in begun) - given_back
            assert held <= 5 or held == costs[item], (item, held)
        return item

    for item in in_order(range(len(costs)), work, cost=costs.__getitem__, budget=5, threads=4):
        with lock:
            given_back += costs[item]


def test_a_budget_of_nothing_makes_one_at_a_time() -> None:
    made: list[int] = []
    for item in in_order(range(5), lambda item: made.append(item) or item, cost=lambda _: 1, budget=0, threads=3):
        assert made == list(range(item + 1))


def test_work_goes_on_while_the_consumer_is_busy() -> None:
    third_is_made = threading.Event()

    def work(item: int) -> int:
        if item == 2:
            third_is_made.set()
        return item

    results = in_order(range(3), work, cost=lambda _: 1, budget=3, threads=1)
    assert next(results) == 0
    assert third_is_made.wait(timeout=60)
    results.close()


def test_the_first_error_in_order_is_raised_and_nothing_more_is_begun() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            time.sleep(0.02)
        if item >= 2:
            raise ValueError(item)
        return item

    results = in_order(range(100), work, cost=lambda _: 1, budget=4, threads=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="2"):
        next(results)
    assert len(begun) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_closing_early_waits_for_what_was_begun_and_begins_no_more() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.01)
        ended.append(item)
        return item

    results = in_order(range(100), work, cost=lambda _: 1, budget=10, threads=2)
    next(results)
    results.close()
    assert sorted(begun) == sorted(ended)
    assert len(begun) < 20


def test_a_result_is_let_go_when_the_next_is_asked_for() -> None:
    results = in_order(range(4), Result, cost=lambda _: 1, budget=0, threads=1)
    last: Callable[[], Result | None] = lambda: None  # noqa: E731
    for result in results:
        assert last() is None
        last = weakref.ref(result)
        del result
