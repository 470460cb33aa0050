"""The README's commands, run as they stand there."""

import json
import re
import shlex
from pathlib import Path

import pytest

from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint
from tests.hub_server import HubServer

pytest_plugins = ("tests.hub_fixtures",)
README = Path(__file__).resolve().parent.parent / "README.md"


def commands(heading: str) -> list[list[str]]:
    section = README.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [shlex.split(line) for line in block[1].splitlines()]


def test_the_five_commands_run_in_their_order(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", max_position_embeddings=512)
    hub.add("meta-llama/Llama-3.1-8B", {path.name: path.read_bytes() for path in checkpoint.iterdir()})
    rows = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    five = commands("Five commands")
    assert [words[1] for words in five] == ["quantize", "finetune", "generate", "merge", "export"]
    for words in five:
        # What would take a day on a full-size model takes three steps here.
        extra = ["--steps", "3", "--batch-size", "2"] if words[1] == "finetune" else []
        assert words[0] == "qlora-pipe"
        assert execute([*words[1:], *extra]) == 0, capsys.readouterr().err
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert "adapter_model.safetensors" in hub.repos["USER/NAME"].files


def test_the_map_names_folders_that_exist() -> None:
    tree = README.read_text().split("## Where things are")[1].split("```")[1]
    top = ""
    for line in tree.splitlines():
        for name in re.findall(r"^( *)([\w/]+/)", line):
            indent, folder = name
            top = folder if not indent else top
            path = README.parent / (folder if not indent else top + folder)
            assert path.is_dir(), path
