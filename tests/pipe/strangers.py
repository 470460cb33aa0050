"""Plugins of strangers that look installed: a module and a .dist-info on the path."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_NUMBERS = itertools.count()

DATASET = """
from qlora_pipe.dataset import Dataset
from qlora_pipe.hookspecs import hookimpl

def example(row):
    return ()

@hookimpl
def register_datasets():
    return [Dataset(name="{name}", help="", example=example)]
"""


class Strangers:
    """Puts plugins on the path, each with a module of its own, which is forgotten afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def install(self, code: str, *, name: str = "broken", distribution: str = "qlora-broken") -> str:
        """Install a plugin with this code, and give its module's name."""
        module = f"stranger_{next(_NUMBERS)}"
        self.modules.append(module)
        (self.folder / f"{module}.py").write_text(code)
        described = self.folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (described / "entry_points.txt").write_text(f"[qlora_pipe]\n{name} = {module}\n")
        return module


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Strangers]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    found = Strangers(folder)
    yield found
    for module in found.modules:
        sys.modules.pop(module, None)
