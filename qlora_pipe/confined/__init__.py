"""Work on what strangers wrote, in a process that can do nothing but compute and answer through a pipe.

The process is a fresh interpreter, with an environment of its own and without the user's secrets. It loads what it
needs, shuts itself in (qlora_pipe/confined/limits.py), and only then looks at a stranger's byte. However it ends, the
caller sees a result or one error with one sentence. What it answers is a stranger's word too: the caller checks it.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import qlora_formats
import qlora_pipe
from qlora_pipe.confined.ending import Ending
from qlora_pipe.errors import DataError

_BOOT = "import sys; sys.path[:] = sys.argv[2:]; from qlora_pipe.confined.worker import main; main(sys.argv[1])"
_PIECE_BYTES = 2**20
_MOST_COMPLAINTS = 2**16
_LONGEST_REASON = 300


class ConfinedError(DataError):
    """Confined work came to nothing; one sentence says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What confined work may use. Memory counts above what the interpreter and its libraries take themselves."""

    memory_bytes: int
    cpu_seconds: int
    wait_seconds: int
    """How long the caller waits for the process in all; the time in which the caller is busy itself does not count."""
    output_bytes: int


def run_confined(
    task: str,
    request: Mapping[str, Any],
    *,
    what: str,
    limits: Limits,
    write: Callable[[bytes], object],
    file: BinaryIO | None = None,
) -> None:
    """Let a module of ours work on a stranger's bytes, and hand each piece of its answer to `write`.

    `task` is the module, whose `prepare(request, file)` gives the work to be done once the process is shut in;
    `request` is JSON. `file` is open in the process too, for reading. `what` begins the sentence of an error: "cannot
    read NAME". Raises ConfinedError however the process fails; what was written until then is void.
    """
    order = json.dumps({"request": dict(request), "limits": asdict(limits), "parent": os.getpid(), "fd": _fd_of(file)})
    with _process(task, file) as process:
        talk = _Talk(order.encode(), limits, write)
        try:
            complaints = talk.with_process(process)
            code = process.wait(timeout=max(talk.seconds_left, 1.0))
        except _Excess as excess:
            raise ConfinedError(f"{what}: {excess}.") from None
        except subprocess.TimeoutExpired:
            raise ConfinedError(f"{what}: it took more than {limits.wait_seconds:,} s.") from None
    if code != Ending.DONE:
        raise ConfinedError(f"{what}: {_reason(code, complaints, limits)}.")


class _Excess(Exception):
    """The process said more, or took longer, than it may."""


class _Talk:
    """The order on its way in, the answer and the complaints on their way out."""

    def __init__(self, order: bytes, limits: Limits, write: Callable[[bytes], object]) -> None:
        self.seconds_left = float(limits.wait_seconds)
        self._order = order
        self._limits = limits
        self._write = write
        self._n_written = 0
        self._complaints = b""

    def with_process(self, process: subprocess.Popen[bytes]) -> bytes:
        """Go on until the process has closed its ends, and give what it said on stderr."""
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as waiting:
            os.set_blocking(process.stdin.fileno(), False)
            waiting.register(process.stdin, selectors.EVENT_WRITE, self._send)
            waiting.register(process.stdout, selectors.EVENT_READ, self._take_answer)
            waiting.register(process.stderr, selectors.EVENT_READ, self._take_complaint)
            while waiting.get_map():
                for key, _ in self._ready(waiting):
                    if not key.data(key.fd):
                        waiting.unregister(key.fileobj)
                        key.fileobj.close()  # type: ignore[union-attr]
        return self._complaints

    def _ready(self, waiting: selectors.BaseSelector) -> list[tuple[selectors.SelectorKey, int]]:
        begun = time.monotonic()
        ready = waiting.select(self.seconds_left)
        self.seconds_left -= time.monotonic() - begun
        if self.seconds_left <= 0:
            raise _Excess(f"it took more than {self._limits.wait_seconds:,} s")
        return ready

    def _send(self, fd: int) -> bool:
        try:
            self._order = self._order[os.write(fd, self._order) :]
        except BrokenPipeError:
            # Its exit code will say why it did not listen.
            return False
        return bool(self._order)

    def _take_answer(self, fd: int) -> bool:
        piece = os.read(fd, _PIECE_BYTES)
        self._n_written += len(piece)
        if self._n_written > self._limits.output_bytes:
            raise _Excess(f"it gave more than {self._limits.output_bytes:,} bytes")
        if piece:
            self._write(piece)
        return bool(piece)

    def _take_complaint(self, fd: int) -> bool:
        piece = os.read(fd, _PIECE_BYTES)
        self._complaints += piece
        if len(self._complaints) > _MOST_COMPLAINTS:
            raise _Excess("it complained without end")
        return bool(piece)


@contextmanager
def _process(task: str, file: BinaryIO | None) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process; it and whatever it started are gone when the block is left, in whatever way."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _BOOT, task, *_import_path()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=_environment(),
        cwd="/",
        pass_fds=() if file is None else (file.fileno(),),
        # Of its own, so that Ctrl-C reaches us alone and we can end it with its children.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # Until it is waited for its number is no one else's, be it dead or alive.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.wait()


def _import_path() -> list[str]:
    """Where modules are found here, as paths that mean the same there; the working folder is not among them."""
    ours = [str(Path(package.__file__ or "").parents[1]) for package in (qlora_pipe, qlora_formats)]
    return [*dict.fromkeys([*ours, *(path for path in sys.path if Path(path).is_absolute())])]


def _environment() -> dict[str, str]:
    """All that the process learns of ours: where libraries lie. One thread, no GPU, no plugins of torch."""
    own = {
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    return own | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def _fd_of(file: BinaryIO | None) -> int | None:
    return None if file is None else file.fileno()


def _reason(code: int, complaints: bytes, limits: Limits) -> str:
    """Why the process ended as it did, in words."""
    memory = f"it needs more than the {limits.memory_bytes // 2**20:,} MiB of memory that it may use"
    if code == Ending.REFUSED:
        return _last_line(complaints) or "it was refused without a reason"
    if code == Ending.NO_MEMORY:
        return memory
    if code == -signal.SIGXCPU:
        return f"it took more than {limits.cpu_seconds:,} s of computing"
    if code < 0:
        return f"the process that read it was ended by {_signal_name(-code)}"
    return f"the process that read it failed ({_last_line(complaints) or f'exit code {code}'})"


def _last_line(complaints: bytes) -> str:
    """The last line that a process we do not trust has said, fit to be shown."""
    lines = complaints.decode(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    shown = "".join(mark if mark.isprintable() else "?" for mark in last.strip())
    return shown if len(shown) <= _LONGEST_REASON else f"{shown[: _LONGEST_REASON - 3]}..."


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
