"""The export target tarball takes a folder, and is installed."""

from pathlib import Path

from qlora_pipe.config import ExportConfig
from qlora_pipe.skeleton.tarball import EXPORTER
from qlora_pipe.testing import RunCli, tiny_checkpoint

pytest_plugins = ["qlora_pipe.testing.fixtures"]


def test_a_folder_is_pushed(tmp_path: Path) -> None:
    where = EXPORTER.push(tiny_checkpoint(tmp_path / "model"), ExportConfig(to="tarball"))
    assert Path(where).is_file()


def test_the_plugin_is_installed(run_cli: RunCli) -> None:
    assert '"tarball"' in run_cli("plugins", "--json").stdout, "install it first: pip install -e ."
