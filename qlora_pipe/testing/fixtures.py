"""Fixtures for pytest. A test module or conftest asks for them: `pytest_plugins = ["qlora_pipe.testing.fixtures"]`.

They are no entry point of pytest: that would import torch into every test run of whoever has qlora_pipe installed.
"""

import contextlib
import io
from collections.abc import Callable
from os import PathLike
from typing import NamedTuple

import pytest

from qlora_pipe.cli import execute


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    exit_code: int
    stdout: str
    stderr: str


RunCli = Callable[..., Ended]
"""Takes the words of a command, texts or paths, without `qlora-pipe` itself."""


@pytest.fixture
def run_cli() -> RunCli:
    """Run `qlora-pipe` in this process: `run_cli("quantize", source, store).exit_code`."""

    def run(*words: str | PathLike[str]) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = execute([str(word) for word in words])
        return Ended(code, out.getvalue(), err.getvalue())

    return run
