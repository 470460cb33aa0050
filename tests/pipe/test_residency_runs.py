"""`--residency` at the command line: whole runs and texts are the same wherever the weights live."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_pipe.cli import execute
from tests.pipe.runs import finetune_line, outcome, small_checkpoint, write_rows
from tests.pipe.test_residency import loaded

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_rows(folder / "rows.jsonl")
    assert (
        execute(["quantize", str(small_checkpoint(folder / "source", num_hidden_layers=3)), str(folder / "store")]) == 0
    )
    return folder


def run(base: Path, out: Path, **settings: object) -> Path:
    line = finetune_line(base / "store", base / "rows.jsonl", out, **{"steps": 4, "save_every": 2, **settings})
    assert execute(line) == 0
    return out


def test_a_whole_run_ends_with_the_same_bytes_wherever_the_weights_live(base: Path, tmp_path: Path) -> None:
    expected = outcome(run(base, tmp_path / "auto"))
    for residency in ("resident", "mapped", "streamed"):
        assert outcome(run(base, tmp_path / residency, residency=residency)) == expected
    for recompute in ("all", "none"):
        out = tmp_path / f"streamed-{recompute}"
        assert outcome(run(base, out, residency="streamed", recompute=recompute, load="read")) == expected


def test_a_run_may_go_on_with_its_weights_elsewhere(base: Path, tmp_path: Path) -> None:
    expected = outcome(run(base, tmp_path / "whole"))
    out = run(base, tmp_path / "moved", residency="streamed")
    # As a run that was stopped at step 2.
    for left in (out / "final", out / "checkpoints" / "step-4"):
        for file in left.iterdir():
            file.unlink()
        left.rmdir()
    assert outcome(run(base, out, residency="resident")) == expected


def test_generation_gives_the_same_text(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for residency in ("resident", "streamed", "mapped"):
        capsys.readouterr()
        words = ["generate", str(base / "store"), "--prompt", "count", "--max-new-tokens", "12", "--device", "cpu"]
        assert execute([*words, "--residency", residency]) == 0
        found.append(capsys.readouterr().out)
    assert len(set(found)) == 1
    assert len(found[0]) > 1


def test_a_damaged_table_is_refused_where_weights_are_streamed_too(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in (base / "store").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "qlora_pipe.json").unlink()
    shard = folder / "model.safetensors"
    data = bytearray(shard.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = "model.layers.1.mlp.up_proj.weight"
    start = 8 + int.from_bytes(data[:8], "little") + header[f"{name}.quant_map"]["data_offsets"][0]
    data[start : start + 4] = b"\0\0\0\0"
    shard.write_bytes(data)
    code = execute(["generate", str(folder), "--prompt", "x", "--device", "cpu", "--residency", "streamed"])
    assert code == 65
    assert f"{name}: its quant_map is not nf4's table of levels" in capsys.readouterr().err


def test_loading_and_computing_import_no_compiler(base: Path) -> None:
    code = (
        "import sys\n"
        "from qlora_pipe.cli import execute\n"
        "code = execute(['generate', sys.argv[1], '--prompt', 'x', '--max-new-tokens', '1', '--device', 'cpu'])\n"
        "sys.exit('torch imported its compiler' if 'torch._dynamo' in sys.modules else code)\n"
    )
    path = os.pathsep.join(str(REPOSITORY / floor) for floor in (".", "formats", "kernels", "plugins"))
    done = subprocess.run(
        [sys.executable, "-c", code, str(base / "store")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_on_a_cpu_weights_are_where_the_file_is_mapped(base: Path) -> None:
    assert {loaded(base / "store", way).residency.way for way in ("auto", "resident", "mapped")} == {"resident"}
