"""What long work says on stderr."""

import pytest

from qlora_pipe.cli import console as module
from qlora_pipe.cli.console import Console


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_bytes_come_with_their_rate_and_the_time_that_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Console() as console:
        # An earlier process did the first 4 GB; they make this one no faster.
        console.transfer("quantize", 4 * 10**9, 16 * 10**9)
        clock.now += 1
        console.transfer("quantize", 5 * 10**9, 16 * 10**9)
        clock.now += 3
        console.transfer("quantize", 6 * 10**9, 16 * 10**9)
        clock.now += 4
        console.transfer("quantize", 16 * 10**9, 16 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "quantize 6.00/16.00 GB  500 MB/s  ETA 0:20",
        "quantize 16.00/16.00 GB  1,500 MB/s",
    ]


def test_small_amounts_are_told_in_megabytes_and_long_waits_in_hours(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Console() as console:
        console.transfer("verify", 0, 900 * 10**6)
        clock.now += 100
        console.transfer("verify", 10**6, 900 * 10**6)
        console.transfer("merge", 0, 5 * 10**6)
        clock.now += 0.01
        console.transfer("merge", 5 * 10**6, 5 * 10**6)
    assert capsys.readouterr().err.splitlines() == [
        "verify 1.0/900.0 MB  0 MB/s  ETA 24:58:20",
        "merge 5.0/5.0 MB",
    ]
