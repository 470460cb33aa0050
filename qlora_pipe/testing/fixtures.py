"""Fixtures for pytest. A test module or conftest asks for them: `pytest_plugins = ["qlora_pipe.testing.fixtures"]`.

They are no entry point of pytest: that would import torch into every test run of whoever has qlora_pipe installed.
"""

import pytest

from qlora_pipe.testing.commands import RunCli, run_command


@pytest.fixture
def run_cli() -> RunCli:
    """Run `qlora-pipe` in this process: `run_cli("quantize", source, store).exit_code`, `.stdout`, `.stderr`."""
    return run_command
