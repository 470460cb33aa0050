"""The confined process itself: load, shut in, work, answer, and leave without a traceback."""

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from qlora_pipe.confined.ending import Ending, Refused
from qlora_pipe.confined.limits import die_with_parent, shut_in

Write = Callable[[bytes | memoryview], None]
Work = Callable[[Write], None]
Prepare = Callable[[dict[str, Any], BinaryIO | None], Work]


def main(task: str) -> NoReturn:
    """Do one task that the caller orders on stdin. Whatever happens, the exit code says it."""
    try:
        _do(task)
    except Refused as refusal:
        _leave(Ending.REFUSED, str(refusal))
    # Nothing may end in a traceback: a stranger's bytes can raise anything.
    except BaseException as fault:
        if ran_out_of_memory(fault):
            _leave(Ending.NO_MEMORY, "")
        _leave(Ending.FAILED, type(fault).__name__)
    _leave(Ending.DONE, "")


def ran_out_of_memory(fault: BaseException) -> bool:
    """Whether an exception means that memory ran out; torch says so in the words of a RuntimeError."""
    if isinstance(fault, MemoryError):
        return True
    return isinstance(fault, RuntimeError) and any(
        words in str(fault) for words in ("bad_alloc", "allocate memory", "not enough memory")
    )


def _do(task: str) -> None:
    # A print by some library must not end up in the answer.
    answer = os.dup(1)
    os.dup2(2, 1)
    order = json.loads(sys.stdin.buffer.read())
    die_with_parent(order["parent"])
    warnings.simplefilter("ignore")
    file = None if order["fd"] is None else open(order["fd"], "rb", buffering=0)  # noqa: PTH123, SIM115
    prepare: Prepare = importlib.import_module(task).prepare
    work = prepare(order["request"], file)
    limits = order["limits"]
    shut_in(memory_bytes=limits["memory_bytes"], cpu_seconds=limits["cpu_seconds"])
    work(lambda data: _write_all(answer, data))


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _leave(ending: Ending, reason: str) -> NoReturn:
    # No farewell of the interpreter: it would take longer than the work.
    if reason:
        os.write(2, f"\n{reason}\n".encode(errors="replace"))
    os._exit(ending)
