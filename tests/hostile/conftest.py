"""Folders of each kind, made once by the program itself, for tests to copy and damage."""

import shutil
from pathlib import Path

import pytest

from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its store, a run on that and what is merged of it."""
    folder = tmp_path_factory.mktemp("made")
    source = tiny_checkpoint(folder / "checkpoint")
    (folder / "text.txt").write_text("a few words to train on, and a few more\n" * 20)
    train = f"finetune {folder / 'store'} --data text:{folder / 'text.txt'} --out {folder / 'run'} --steps 1"
    for words in (
        ["quantize", str(source), str(folder / "store")],
        [*train.split(), "--batch-size", "1", "--max-tokens", "32", "--learning-rate", "1e-2"],
    ):
        assert execute(words) == 0
    shutil.copytree(folder / "run" / "final", folder / "adapter")
    return folder
