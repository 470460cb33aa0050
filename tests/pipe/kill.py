"""Kill commands at random moments.

Starting Python and torch takes seconds, and what is tested takes less than one. So a nursery, a process of its own with
torch imported and one thread, forks a child per command; the test decides when it dies.
"""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_IMPORTED_WHEN_NEEDED = (
    "qlora_pipe.cli.console",
    "qlora_pipe.cli.finetune",
    "qlora_pipe.cli.merge",
    "qlora_pipe.cli.quantize",
    "qlora_pipe.stages.finetune",
    "qlora_pipe.stages.merge",
    "qlora_pipe.stages.quantize",
    "qlora_pipe.nn.decoder",
)
# A run is let through after this many kills: much of what a rerun does is looking at what is there.
_MOST_KILLS = 3


class Nursery:
    """The process that forks children; used as a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._started = 0
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, arguments: Sequence[str], *, kill_at: int | None = None) -> "Child":
        """Start `qlora-pipe` with these arguments in a child, which kills itself at a moment of its work on the disk.

        Moments are counted from 0: one before and one after each write, fsync, rename and so on. Where it gets to the
        end, its last line says how many there were.
        """
        self._started += 1
        log = self._folder / f"{self._started}.log"
        pid = self.ask("start", arguments=list(arguments), log=str(log), kill_at=kill_at)
        return Child(self, int(pid), log)

    def ask(self, what: str, **details: Any) -> Any:
        """Send the nursery one request and give its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, **details}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nursery has died"
        return json.loads(answer)


@dataclass
class Child:
    """A command that is running."""

    nursery: Nursery
    pid: int
    log: Path

    def send(self, number: signal.Signals) -> None:
        """Send a signal; the child stays a zombie until `wait`, so its id can be no one else's."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code once it has ended, or the negative number of the signal that killed it."""
        return int(self.nursery.ask("wait", pid=self.pid))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return as soon as `condition` holds."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.001)

    def said(self) -> str:
        """What it has written to stdout and stderr."""
        return self.log.read_text()


@dataclass(frozen=True, kw_only=True)
class Work:
    """A command that makes a folder, and how to look at that folder from outside."""

    arguments: Callable[[Path], list[str]]
    begun: Callable[[Path], bool]
    """Whether the first of its commits has happened."""
    finished: Callable[[Path], bool]
    """Whether the last one has."""
    outcome: Callable[[Path], object]
    """What must be equal in the end."""


@dataclass
class Tally:
    """How runs fared that were killed at random moments and rerun until they were done."""

    runs: int = 0
    identical: int = 0
    kills: int = 0
    kills_between_first_and_last_commit: int = 0


def kill_at_random(nursery: Nursery, work: Work, folder: Path, *, runs: int, seed: int) -> Tally:
    """Make the work's folder `runs` times, killing each run with SIGKILL at least once, and compare the outcomes."""
    begun = time.monotonic()
    assert nursery.start(work.arguments(folder / "whole")).wait() == 0
    duration = time.monotonic() - begun
    expected = work.outcome(folder / "whole")
    draws, tally = random.Random(seed), Tally()
    while tally.runs < runs:
        out = folder / f"run-{tally.runs}"
        kills, between, seconds = _kill_until_done(nursery, work, out, longest=duration, draws=draws)
        if kills:
            tally.runs += 1
            tally.identical += work.outcome(out) == expected
            tally.kills += kills
            tally.kills_between_first_and_last_commit += between
        else:
            # It was faster than the one that was measured; the machine has more to give now.
            duration = seconds
        shutil.rmtree(out)
    return tally


def _kill_until_done(
    nursery: Nursery, work: Work, out: Path, *, longest: float, draws: random.Random
) -> tuple[int, int, float]:
    """Give the kills, those between the first and the last commit, and the seconds of the last attempt."""
    kills = between = 0
    while True:
        begun = time.monotonic()
        child = nursery.start(work.arguments(out))
        if kills < _MOST_KILLS:
            time.sleep(draws.uniform(0, longest))
            child.send(signal.SIGKILL)
        code = child.wait()
        if code == 0:
            return kills, between, time.monotonic() - begun
        assert code == -signal.SIGKILL, child.said()
        kills += 1
        between += work.begun(out) and not work.finished(out)


def _serve() -> None:
    """Be the nursery: answer requests on stdin until it is closed."""
    _warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        if request["what"] == "start":
            answer = _fork(request["arguments"], log=request["log"], kill_at=request["kill_at"])
        else:
            _, status = os.waitpid(request["pid"], 0)
            answer = os.waitstatus_to_exitcode(status)
        print(answer, flush=True)


def _warm_up() -> None:
    """Import what the commands import when they run. No backward pass: torch refuses to fork after one."""
    import torch

    from qlora_pipe.config import FinetuneConfig
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.settings import checked, to_yaml

    for name in _IMPORTED_WHEN_NEEDED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    load_plugins()
    checked(FinetuneConfig, {"steps": 1}, where="")
    to_yaml({})
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.AdamW([parameter], foreach=False).step()


class _Moments:
    """Counts the moments before and after every effect on the disk, and ends the process at the chosen one."""

    def __init__(self, kill_at: int) -> None:
        from qlora_formats import commit, disk

        self._kill_at = kill_at
        self.passed = 0
        effects = ("_write", "_truncate", "_fsync", "_rename", "_unlink", "_mkdir", "_rmdir")
        for module, name in ((commit, "_open"), *((disk, effect) for effect in effects)):
            setattr(module, name, self._watched(getattr(module, name)))

    def _watched(self, effect: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self._pass()
            result = effect(*arguments)
            self._pass()
            return result

        return watched

    def _pass(self) -> None:
        if self.passed == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1


def _fork(arguments: list[str], *, log: str, kill_at: int | None) -> int:
    from qlora_pipe.cli import execute

    if pid := os.fork():
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    moments = None if kill_at is None else _Moments(kill_at)
    code = execute(arguments)
    if moments is not None:
        print(f"moments {moments.passed}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
