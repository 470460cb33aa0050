"""Quantize, and the pipeline around it, on a tiny checkpoint."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.manifest import Manifest
from qlora_formats.store import Store, StoredWeight
from qlora_kernels import cpu, dequantize_reference
from qlora_pipe.artifacts import Checkpoint
from qlora_pipe.cli import execute
from qlora_pipe.config import QuantizeConfig
from qlora_pipe.errors import DataError
from qlora_pipe.nn.linear import quantized_tensor
from qlora_pipe.plugins import load_plugins
from qlora_pipe.stages.quantize import quantize
from qlora_pipe.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "source", intermediate_size=73)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_command_into_two_places_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert execute(["quantize", str(source), str(tmp_path / name)]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_is_quantised_and_what_is_kept(source: Path, tmp_path: Path) -> None:
    assert execute(["quantize", str(source), str(tmp_path / "store")]) == 0
    store, exact = Store.open(tmp_path / "store"), load_file(source / "model.safetensors")
    assert set(store.names) == set(exact)
    for name in store.names:
        stored = store.weight(name)
        assert store.is_quantized(name) == ("_proj" in name)
        if isinstance(stored, StoredWeight):
            dense = dequantize_reference(quantized_tensor(stored, name=name), torch.float32)
            assert 0.02 < (dense - exact[name]).norm() / exact[name].norm() < 0.15
        else:
            assert torch.equal(stored, exact[name])


def test_the_manifest_holds_settings_source_and_each_error(source: Path, tmp_path: Path) -> None:
    assert execute(["quantize", str(source), str(tmp_path / "store"), "--type", "fp4", "--no-double-quant"]) == 0
    manifest = Manifest.read(tmp_path / "store")
    manifest.verify(tmp_path / "store")
    assert manifest.inputs["settings"]["type"] == "fp4"
    assert manifest.inputs["settings"]["double_quant"] is False
    assert set(manifest.inputs["source"]["sha256"]) == {"config.json", "model.safetensors"}
    facts = manifest.files["model.safetensors"].facts["tensors"]
    errors = {name: known["relative_error"] for name, known in facts.items() if "relative_error" in known}
    assert len(errors) == 14
    assert all(0.05 < error < 0.2 for error in errors.values())
    assert str(source) not in (tmp_path / "store" / "qlora_pipe.json").read_text()


def test_a_finished_store_is_left_alone_and_other_settings_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(source), str(tmp_path / "store")]
    assert execute(command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert execute(command) == 0
    assert "already done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == before
    assert execute([*command, "--block-size", "128"]) == 73
    assert "settings.block_size was 64 and is now 128" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_checkpoint(tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert execute(["quantize", str(folder), str(tmp_path / "store")]) == 65
    assert "model.layers.1.mlp.up_proj.weight: cannot quantize a tensor that holds NaN or infinity" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "store").exists()


def test_a_store_is_not_quantised_again(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["quantize", str(source), str(tmp_path / "store")]) == 0
    assert execute(["quantize", str(tmp_path / "store"), str(tmp_path / "again")]) == 65
    assert "is already a 4-bit store" in capsys.readouterr().err


def test_an_unknown_family_is_refused_with_the_installed_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint(tmp_path / "source", model_type="no-such-family")
    assert execute(["quantize", str(folder), str(tmp_path / "store")]) == 78
    said = capsys.readouterr().err
    assert "no installed plugin reads model_type 'no-such-family' (installed: " in said
    assert "llama" in said


def test_a_pipeline_runs_its_stages_and_passes_over_what_is_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("pipeline.yaml").write_text(
        f"quantize: {{source: {source}, out: store}}\n"
        "finetune: {data: 'jsonl:rows.jsonl', out: run, steps: 2, batch_size: 2, rank: 2}\n"
        "merge: {out: merged, dtype: float32}\n"
    )
    assert execute(["run", "pipeline.yaml"]) == 0
    first = capsys.readouterr().out
    assert [line.split()[0] for line in first.splitlines()] == ["quantize", "finetune", "merge"]
    before = contents(tmp_path)
    assert execute(["run", "pipeline.yaml"]) == 0
    again = capsys.readouterr()
    assert again.out.count("already done") == 2
    assert "run is already done" in again.err
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def with_c_kernels(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store made the way this machine makes it."""
    out = tmp_path_factory.mktemp("made") / "store"
    assert execute(["quantize", str(source), str(out)]) == 0
    return out


@pytest.fixture
def _no_c_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation that found no C compiler."""
    monkeypatch.setattr(cpu, "library", lambda: None)
    cpu.paths.cache_clear()
    yield
    cpu.paths.cache_clear()


def test_without_the_c_kernels_one_line_says_so_and_the_bytes_are_the_same(
    source: Path,
    with_c_kernels: Path,
    _no_c_kernels: None,  # noqa: PT019
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert execute(["quantize", str(source), str(tmp_path / "store")]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "were not built" in notes[0]
    made = {name: data for name, data in contents(tmp_path / "store").items() if name.endswith(".safetensors")}
    wanted = contents(with_c_kernels)
    assert made == {name: wanted[name] for name in made}


class Stopped(Exception):
    pass


def stopped(source: Path, out: Path, *, at: int) -> list[tuple[int, int]]:
    """Quantise until the progress has been told of `at` steps, and give what it was told."""
    told: list[tuple[int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        assert what == "quantize"
        told.append((done, total))
        if len(told) == at:
            raise Stopped

    with pytest.raises(Stopped):
        quantize(Checkpoint.open(source), out, QuantizeConfig(shard_mib=1), manager=load_plugins(), progress=progress)
    return told


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose store has several files of 1 MiB."""
    folder = tmp_path_factory.mktemp("larger") / "source"
    return tiny_checkpoint(folder, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4)


def test_what_was_finished_before_an_interruption_is_kept_and_counted(larger: Path, tmp_path: Path) -> None:
    assert execute(["quantize", str(larger), str(tmp_path / "whole"), "--shard-mib", "1"]) == 0
    told = stopped(larger, tmp_path / "store", at=45)
    assert told[0] == (0, told[-1][1])
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    finished = {path.name: path.stat().st_ino for path in (tmp_path / ".store.partial").glob("*.safetensors")}
    assert finished
    again = stopped(larger, tmp_path / "store", at=1)
    # All but what the unfinished file held of it.
    assert 0 < again[0][0] < told[-1][0]
    assert execute(["quantize", str(larger), str(tmp_path / "store"), "--shard-mib", "1"]) == 0
    assert {name: (tmp_path / "store" / name).stat().st_ino for name in finished} == finished
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_source_that_changed_since_an_interruption_is_not_mixed_with_what_it_was(
    larger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(larger, tmp_path / "source")
    stopped(tmp_path / "source", tmp_path / "store", at=45)
    weights = tmp_path / "source" / "model.safetensors"
    state = weights.stat()
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert execute(["quantize", str(tmp_path / "source"), str(tmp_path / "store"), "--shard-mib", "1"]) == 73
    sentence = capsys.readouterr().err
    assert "was begun with other inputs or settings: source.files.model.safetensors was" in sentence
    assert "delete that folder" in sentence


def test_a_source_that_changes_while_it_is_quantised_is_refused(larger: Path, tmp_path: Path) -> None:
    shutil.copytree(larger, tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"

    def touch(_what: str, done: int, total: int) -> None:
        if done == total:
            state = weights.stat()
            os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns + 1))

    with pytest.raises(DataError, match="was changed while it was quantised"):
        quantize(
            Checkpoint.open(tmp_path / "source"),
            tmp_path / "store",
            QuantizeConfig(),
            manager=load_plugins(),
            progress=touch,
        )
    assert not (tmp_path / "store").exists()


def test_sizes_and_times_of_the_source_stand_in_no_finished_store(larger: Path, tmp_path: Path) -> None:
    assert execute(["quantize", str(larger), str(tmp_path / "store")]) == 0
    assert set(Manifest.read(tmp_path / "store").inputs["source"]) == {"sha256"}


def test_what_is_read_of_the_source_is_given_back_at_once(
    larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    release = CheckpointFolder.release
    monkeypatch.setattr(
        CheckpointFolder, "release", lambda folder, name: (released.append(name), release(folder, name))
    )
    assert execute(["quantize", str(larger), str(tmp_path / "store")]) == 0
    assert sorted(released) == sorted(load_file(larger / "model.safetensors"))
