"""The family toy keeps what qlora_pipe expects of an architecture, and is installed."""

from pathlib import Path

from qlora_pipe.skeleton.toy import ARCHITECTURE
from qlora_pipe.testing import RunCli, check_architecture, tiny_checkpoint

pytest_plugins = ["qlora_pipe.testing.fixtures"]


def test_the_architecture_conforms() -> None:
    # A `reference` makes it compare logits with those of another implementation; docs/plugins.md says how.
    check_architecture(ARCHITECTURE)


def test_the_installed_plugin_quantizes_its_checkpoint(run_cli: RunCli, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", family=ARCHITECTURE)
    done = run_cli("quantize", source, tmp_path / "store")
    assert done.exit_code == 0, f"{done.stderr} Install it first: pip install -e ."
