"""Sharing work out among threads."""

import threading

import pytest
import torch

from qlora_kernels.threads import in_shares


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("count", [1, 9, 10, 11, 20, 21, 119, 120, 121, 10_007])
def test_every_number_is_done_once_in_shares_that_start_at_multiples(count: int) -> None:
    shares = []
    assert in_shares(lambda start, stop: shares.append((start, stop)) or True, count, smallest=10)
    shares.sort()
    assert all(start % 10 == 0 for start, _ in shares)
    assert [shares[0][0], *(stop for _, stop in shares)] == [*(start for start, _ in shares), count]


@pytest.mark.usefixtures("three_threads")
def test_three_threads_work_at_once() -> None:
    meeting = threading.Barrier(3, timeout=30)

    def work(start: int, stop: int) -> bool:
        if start < 3:
            meeting.wait()
        return True

    assert in_shares(work, 12, smallest=1)


@pytest.mark.usefixtures("three_threads")
def test_little_work_stays_in_the_calling_thread() -> None:
    assert in_shares(lambda start, stop: threading.current_thread() is threading.main_thread(), 10, smallest=10)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("failing", [0, 5, 11])
def test_one_share_that_fails_is_told(failing: int) -> None:
    assert not in_shares(lambda start, stop: not start <= failing < stop, 12, smallest=1)


@pytest.mark.usefixtures("three_threads")
def test_a_fault_in_any_thread_is_raised() -> None:
    meeting = threading.Barrier(3, timeout=30)

    def work(start: int, stop: int) -> bool:
        if start < 3:
            meeting.wait()
        if threading.current_thread() is not threading.main_thread():
            raise KeyError(start)
        return True

    with pytest.raises(KeyError):
        in_shares(work, 12, smallest=1)
