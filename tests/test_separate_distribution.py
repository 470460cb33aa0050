"""A plugin in a distribution of its own: installed from its own pyproject, tested, used, and removed again."""

import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "qlora-pipe-gemma2"
# In one process, since each imports torch.
QUANTIZE = """
import sys
from pathlib import Path
from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint

tiny_checkpoint(Path("base"), family="gemma2")
sys.exit(execute(["quantize", "base", "store"]))
"""
# With its extra installed, transformers would build what no plugin reads.
WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
from qlora_pipe.cli import execute
sys.exit(execute(sys.argv[1:]))
"""


class Environment:
    """A fresh virtual environment that sees the packages of the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, symlinks=True)
        self.python = next(path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists())
        [packages] = folder.rglob("site-packages")
        seen = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        # Not a mere path: what is installed for editing is found by a .pth file in there.
        lines = [f"import site; site.addsitedir({path!r})" for path in seen]
        (packages / "outer.pth").write_text("\n".join(lines) + "\n")

    def run(self, *words: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """Run Python with this checkout's own packages in front, and without a network for pip."""
        ours = [ROOT, *(ROOT / floor for floor in ("formats", "kernels", "plugins"))]
        settings = {
            "PYTHONPATH": os.pathsep.join(map(str, ours)),
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [str(word) for word in (self.python, *words)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | settings
        return subprocess.run(
            command, cwd=cwd or self.folder, env=environment, capture_output=True, text=True, check=False
        )


def succeeded(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_plugin_is_installed_tested_used_and_removed_as_a_strangers_would_be(tmp_path: Path) -> None:
    pytest.importorskip("pip", reason="there is no pip here to install with")
    environment = Environment(tmp_path / "environment")
    # A copy: building leaves files beside the sources.
    example = shutil.copytree(EXAMPLE, tmp_path / "example", ignore=shutil.ignore_patterns("*.egg-info", "build"))
    succeeded(environment.run("-m", "pip", "install", "--no-deps", "--no-build-isolation", example))

    tested = succeeded(environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=example))
    assert " passed" in tested
    assert "skipped" not in tested

    listed = json.loads(succeeded(environment.run("-m", "qlora_pipe", "plugins", "--json")))
    [entry] = [entry for entry in listed if entry["distribution"] == "qlora-pipe-gemma2"]
    assert entry == {
        "name": "gemma2",
        "kind": "architecture",
        "plugin": "gemma2",
        "distribution": "qlora-pipe-gemma2",
        "version": "0.1.0",
        "help": "reads model_type gemma2",
    }

    succeeded(environment.run("-c", QUANTIZE, cwd=tmp_path))
    assert json.loads((tmp_path / "store" / "config.json").read_text())["model_type"] == "gemma2"

    succeeded(environment.run("-m", "pip", "uninstall", "--yes", "qlora-pipe-gemma2"))
    refused = environment.run("-c", WITHOUT_TRANSFORMERS, "quantize", tmp_path / "base", tmp_path / "again")
    assert refused.returncode != 0
    said = refused.stderr.replace("\n", " ")
    assert "no installed plugin reads model_type 'gemma2' (installed: " in said
    installed = said.partition("(installed: ")[2].partition(")")[0]
    assert "llama" in installed
    assert not (tmp_path / "again").exists()
