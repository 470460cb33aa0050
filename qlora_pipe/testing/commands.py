"""Run `qlora-pipe` in this process, as a test sees it."""

import contextlib
import io
from collections.abc import Callable
from os import PathLike
from typing import NamedTuple

from qlora_pipe.cli import execute


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    exit_code: int
    stdout: str
    stderr: str


RunCli = Callable[..., Ended]
"""Takes the words of a command, texts or paths, without `qlora-pipe` itself: what the fixture `run_cli` is."""


def run_command(*words: str | PathLike[str]) -> Ended:
    """Run one command; nothing it prints is shown."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = execute([str(word) for word in words])
    return Ended(code, out.getvalue(), err.getvalue())
