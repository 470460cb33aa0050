"""Try out in processes of their own what plugins do when they are imported.

An import can do anything: raise, leave the process, crash it, or never come back. Here it does so where it takes
nothing else with it. Each plugin has a process, all of them run at once, and each has the same time; what it prints is
thrown away. A plugin that came through is then imported for good by whoever asked.
"""

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import EntryPoint

# Where modules are found is told by the caller: its path may have been changed since it began.
_BOOT = "import sys; sys.path[:] = sys.argv[6:]; from qlora_pipe.plugin_probe import answer; answer(*sys.argv[1:6])"
_LONGEST_REASON = 300
_MOST_ANSWER = 1 << 16


def probe(points: Sequence[EntryPoint], *, seconds: float) -> dict[EntryPoint, str | None]:
    """Import each entry point in a process of its own: why it can't be imported here, or None where it can."""
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        trials = {point: stack.enter_context(_Trial(point, seconds)) for point in points}
        return {point: trial.verdict(deadline) for point, trial in trials.items()}


class _Trial:
    """One plugin's process; it and whatever it started are gone when the block is left."""

    def __init__(self, point: EntryPoint, seconds: float) -> None:
        self._point, self._seconds = point, seconds

    def __enter__(self) -> "_Trial":
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        point = self._point
        # Nobody is left to end it where this process is killed.
        at_last = str(math.ceil(self._seconds) + 1)
        order = [at_last, str(write), point.name, point.value, point.group, *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *order],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write,),
            # Of its own, so that it can be ended with its children.
            start_new_session=True,
        )
        os.close(write)
        return self

    def __exit__(self, *_: object) -> None:
        # The group may outlive its first process.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        os.close(self._read)
        self._process.wait()

    def verdict(self, deadline: float) -> str | None:
        """Wait for the answer, or for the end without one."""
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._read, selectors.EVENT_READ)
            if not waiting.select(max(0.0, deadline - time.monotonic())):
                return f"its import took more than {self._seconds:g} s (QLORA_PIPE_PLUGINS_TIMEOUT allows more)"
        said = os.read(self._read, _MOST_ANSWER)
        if said:
            fault: str | None = json.loads(said)
            return fault
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its import ended the process ({how})"


def answer(at_last: str, fd: str, name: str, value: str, group: str) -> None:
    """Import one entry point, in the process that was made for it, and say through `fd` how that went.

    After `at_last` seconds the process ends, whether anyone waits for it or not.
    """
    signal.alarm(int(at_last))
    try:
        EntryPoint(name=name, value=value, group=group).load()
        fault = None
    except BaseException as raised:
        # Whatever it is, it must not end this process without an answer.
        fault = said_of(raised)
    os.write(int(fd), json.dumps(fault).encode())
    # Threads that the import has started would go on for ever.
    os._exit(0)


def said_of(fault: BaseException) -> str:
    """Say in one line what was raised."""
    words = f"{fault}".split()
    text = " ".join([f"{type(fault).__name__}:", *words]) if words else type(fault).__name__
    shown = "".join(mark if mark.isprintable() else "?" for mark in text)
    return shown if len(shown) <= _LONGEST_REASON else f"{shown[: _LONGEST_REASON - 3]}..."
