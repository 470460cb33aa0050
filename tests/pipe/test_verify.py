"""`verify`: every kind of folder is read whole, all that is damaged is named, and what cannot be told is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_formats.header import read_header
from qlora_pipe.cli import execute
from qlora_pipe.stages.verify import verify
from qlora_pipe.testing import tiny_checkpoint
from tests.hub_server import HubServer
from tests.pipe.runs import finetune_line, write_rows

pytest_plugins = ("tests.hub_fixtures",)

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
V_PROJ = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a store of it, a run with two checkpoints, and what is merged of these."""
    folder = tmp_path_factory.mktemp("made")
    source, store, run = tiny_checkpoint(folder / "source"), folder / "store", folder / "run"
    assert execute(["quantize", str(source), str(store)]) == 0
    rows = write_rows(folder / "rows.jsonl")
    assert execute(finetune_line(store, rows, run, steps=3, save_every=2, eval_every=0)) == 0
    assert execute(["merge", str(store), str(run), str(folder / "merged")]) == 0
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the folders, to be damaged."""
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def flip_tensor(path: Path, name: str) -> None:
    flip(path, read_header(path).entries[name].start)


def failing(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert execute(["verify", str(folder)]) == 65
    said = capsys.readouterr()
    assert said.out == ""
    return [line.removeprefix("error: ") for line in said.err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("store", "store"),
        ("merged", "checkpoint"),
        ("run", "run"),
        ("run/final", "adapter"),
        ("run/checkpoints/step-2", "training"),
    ],
)
def test_what_we_wrote_is_whole_and_a_flipped_bit_in_any_of_its_files_is_named(
    made: Path, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    parent, _, rest = name.partition("/")
    folder = copied(parent) / rest
    assert execute(["verify", str(folder)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder}: {kind}, ")
    assert "every byte is as it was written" in line
    files = [path for path in folder.rglob("*.*") if path.is_file()]
    files = [path for path in files if path.name not in {"config.resolved.yaml", "metrics.jsonl"}]
    assert len(files) >= 2
    for path in files:
        flip(path, path.stat().st_size // 2)
        said = failing(folder, capsys)
        assert str(path) in said[0]
        # What a damaged manifest says of the files may be wrong as well.
        assert len(said) == 1 or path.name == "qlora_pipe.json"
        flip(path, path.stat().st_size // 2)
    assert execute(["verify", str(folder)]) == 0


def test_all_damage_is_told_with_the_weights_by_name(
    copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store = copied("store")
    shard = store / "model.safetensors"
    flip_tensor(shard, Q_PROJ)
    flip_tensor(shard, f"{V_PROJ}.nested_absmax")
    flip(store / "tokenizer.json", 100)
    (store / "generation_config.json").unlink()
    said = failing(store, capsys)
    assert len(said) == 4
    assert all(any(f"{shard}: the weight {weight!r} does not" in line for line in said) for weight in (Q_PROJ, V_PROJ))
    assert any(str(store / "tokenizer.json") in line for line in said)
    assert any("lacks the file generation_config.json" in line for line in said)

    assert execute(["verify", str(store), "--json"]) == 65
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["kind"], found["checksums"], found["damage"]) == (False, "store", True, said)


def test_json_says_what_was_read(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["verify", str(made / "store"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = [path.stat().st_size for path in (made / "store").iterdir() if path.name != "qlora_pipe.json"]
    assert found.pop("seconds") > 0
    assert found == {
        "ok": True,
        "kind": "store",
        "checksums": True,
        "files": len(sizes),
        "bytes": sum(sizes),
        "damage": [],
        "notes": [],
    }


def test_progress_counts_bytes(made: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    found = verify(str(made / "merged"), progress=lambda *said: seen.append(said))
    assert seen[-1] == ("verify", found.bytes, found.bytes)


def test_a_run_tells_which_of_its_folders_is_damaged_and_what_has_no_checksum(
    copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied("run")
    flip(run / "checkpoints/step-3/state.safetensors", 5000)
    (run / "checkpoints/step-2/qlora_pipe.json").unlink()
    said = failing(run, capsys)
    assert [line.split()[0] for line in said] == [
        str(run / "checkpoints/step-3/state.safetensors"),
        str(run / "checkpoints/step-2"),
    ]
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "final")
    found = verify(str(run))
    assert (found.ok, found.files) == (True, 0)
    assert [note.split(",")[0] for note in found.notes] == [
        "the run has not ended",
        "config.resolved.yaml and metrics.jsonl carry no checksums.",
    ]
    (run / "config.resolved.yaml").write_text("steps: [")
    (sentence,) = failing(run, capsys)
    assert "config.resolved.yaml is not usable YAML" in sentence


def test_a_list_of_damage_is_bounded(copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    store = copied("store")
    for number in range(120):
        (store / f"model-{number}.safetensors").write_bytes(b"")
    said = failing(store, capsys)
    assert len(said) == 101
    assert said[-1] == "and 20 more"


def foreign(folder: Path, target: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """The same folder as another program would have written it."""
    shutil.copytree(folder, target)
    (target / "qlora_pipe.json").unlink(missing_ok=True)
    (weights,) = target.glob("*.safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["source", "store", "run/final"])
def test_a_folder_without_checksums_is_checked_as_far_as_it_can_be_and_says_so(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = foreign(made / name, tmp_path / "foreign")
    assert execute(["verify", str(folder)]) == 0
    said = capsys.readouterr()
    assert "it carries no checksums" in said.out
    assert f"note: {folder} has no qlora_pipe.json, so there are no checksums to compare." in said.err
    assert ("quant_state" in said.err) == (name == "store")
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    (sentence,) = failing(folder, capsys)
    assert f"{weights} is cut off" in sentence


def test_the_scales_and_levels_of_a_foreign_store_must_make_sense(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{Q_PROJ}.nested_absmax"][0] = torch.inf
        tensors[f"{V_PROJ}.quant_map"][3] += 0.01
        tensors["model.layers.0.mlp.up_proj.weight.nested_quant_map"][255] = torch.nan

    folder = foreign(made / "store", tmp_path / "foreign", change)
    said = failing(folder, capsys)
    assert len(said) == 3
    assert any(f"{Q_PROJ}: its nested_absmax holds NaN or infinity" in line for line in said)
    assert any(f"{V_PROJ}: its quant_map is not nf4's table of levels" in line for line in said)
    assert any("up_proj.weight: its nested_quant_map holds NaN or infinity" in line for line in said)


def test_plain_scales_that_are_not_finite_are_found_too(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["quantize", str(made / "source"), str(tmp_path / "plain"), "--no-double-quant"]) == 0

    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{Q_PROJ}.absmax"][2] = torch.nan

    (sentence,) = failing(foreign(tmp_path / "plain", tmp_path / "foreign", change), capsys)
    assert f"{Q_PROJ}: its absmax holds values that are not finite" in sentence


def test_an_adapter_of_another_program_must_be_finite(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values()))[0, 0] = torch.nan

    (sentence,) = failing(foreign(made / "run/final", tmp_path / "foreign", change), capsys)
    assert "the adapter of model.layers.0." in sentence


def test_a_store_on_the_hub_is_verified_by_its_id(
    made: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path.name: path.read_bytes() for path in (made / "store").iterdir()}
    hub.add("someone/store", files)
    assert execute(["verify", "someone/store"]) == 0
    assert "every byte is as it was written" in capsys.readouterr().out
    damaged = bytearray(files["model.safetensors"])
    damaged[-1] ^= 1
    hub.add("someone/store", files | {"model.safetensors": bytes(damaged)})
    assert len(failing(Path("someone/store"), capsys)) == 1


def test_what_is_no_model_or_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sentence,) = failing(tmp_path, capsys)
    assert sentence == f"{tmp_path} is not a model: it has no config.json"
    assert execute(["verify", str(tmp_path / "nowhere")]) == 66
