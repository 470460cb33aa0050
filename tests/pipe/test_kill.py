"""Processes that are killed, told to stop, or in each other's way."""

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.pipe.kill import Child, Nursery, Work, kill_at_random
from tests.pipe.runs import finetune_line, outcome, works

# One nursery serves them all.
pytestmark = pytest.mark.xdist_group("kill")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("logs")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def stages(nursery: Nursery, inputs: Path) -> Mapping[str, Work]:
    return works(nursery, inputs)


@pytest.mark.parametrize(("stage", "runs"), [("finetune", 10), ("quantize", 60), ("merge", 10)])
def test_runs_killed_at_random_moments_and_rerun_end_byte_identical(
    *,
    nursery: Nursery,
    stages: Mapping[str, Work],
    tmp_path: Path,
    stage: str,
    runs: int,
    record_property: Callable[[str, str], None],
) -> None:
    tally = kill_at_random(nursery, stages[stage], tmp_path, runs=runs, seed=0)
    record_property(
        "counted",
        f"{stage}: {tally.identical} of {tally.runs} killed runs byte-identical, {tally.kills} kills,"
        f" {tally.kills_between_first_and_last_commit} of them between the first and the last commit",
    )
    assert tally.identical == tally.runs == runs
    # Otherwise nothing was there that could be lost.
    assert tally.kills_between_first_and_last_commit > 0


@pytest.fixture(scope="module")
def long_line(stages: Mapping[str, Work], inputs: Path) -> Callable[[Path], list[str]]:
    """A fine-tune that takes a good deal longer than a signal."""
    return lambda out: finetune_line(inputs / "small", inputs / "rows.jsonl", out, steps=50, save_every=1)


@pytest.fixture(scope="module")
def expected(nursery: Nursery, long_line: Callable[[Path], list[str]], inputs: Path) -> object:
    assert nursery.start(long_line(inputs / "whole")).wait() == 0
    return outcome(inputs / "whole")


def begun(nursery: Nursery, line: list[str], out: Path) -> Child:
    """A command that has saved its first checkpoint."""
    child = nursery.start(line)
    child.wait_until(lambda: any(out.glob("checkpoints/step-*")))
    return child


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_process_that_is_told_to_stop_saves_says_how_to_go_on_and_leaves(
    *,
    nursery: Nursery,
    long_line: Callable[[Path], list[str]],
    expected: object,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    child = begun(nursery, long_line(tmp_path / "run"), tmp_path / "run")
    child.send(number)
    assert child.wait() == code
    assert "Run the same command again" in child.said()
    assert "Traceback" not in child.said()
    assert not (tmp_path / "run" / "final").exists()
    again = nursery.start(long_line(tmp_path / "run"))
    assert again.wait() == 0
    assert "going on from step" in again.said()
    assert outcome(tmp_path / "run") == expected


def test_two_processes_with_one_run_do_not_mix(
    nursery: Nursery, long_line: Callable[[Path], list[str]], expected: object, tmp_path: Path
) -> None:
    line = long_line(tmp_path / "run")
    first = begun(nursery, line, tmp_path / "run")
    second = nursery.start(line)
    assert second.wait() == 75
    assert "is locked: another process is writing it" in second.said()
    assert first.wait() == 0
    assert outcome(tmp_path / "run") == expected
