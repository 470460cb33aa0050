"""`--load mmap|read`: the same bytes both ways, nothing mapped when reading, and a note on a network disk."""

import mmap
import shutil
from pathlib import Path

import pytest

from qlora_formats import loading
from qlora_formats.held_file import HeldFile
from qlora_pipe.artifacts import open_model
from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint
from tests.pipe.runs import SETTINGS, command, contents, finetune_line, write_rows


def run(*words: object, **settings: object) -> None:
    assert execute(command(str(words[0]), *words[1:], **settings)) == 0


def test_every_command_gives_the_same_bytes_both_ways_and_takes_them_for_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, rows = tiny_checkpoint(tmp_path / "source"), write_rows(tmp_path / "rows.jsonl")
    stores, runs, merged = ([tmp_path / f"{name}-{load}" for load in ("mmap", "read")] for name in ("s", "r", "m"))
    said = []
    for load, store, out, whole in zip(("mmap", "read"), stores, runs, merged, strict=True):
        run("quantize", source, store, load=load)
        assert execute(finetune_line(store, rows, out, load=load, steps=2, eval_every=0)) == 0
        run("merge", store, out, whole, load=load)
        capsys.readouterr()
        run("generate", store, adapter=out, prompt="count", max_new_tokens=8, load=load)
        run("generate", whole, prompt="count", max_new_tokens=8, load=load)
        said.append(capsys.readouterr().out)
    assert contents(stores[0]) == contents(stores[1])
    assert contents(runs[0] / "final") == contents(runs[1] / "final")
    assert contents(merged[0]) == contents(merged[1])
    assert said[0] == said[1] != ""
    # The way of loading is no part of what was asked for.
    run("quantize", source, stores[0], load="read")
    run("merge", stores[0], runs[0], merged[0], load="read")
    assert execute(finetune_line(stores[0], rows, runs[0], load="read", steps=2, eval_every=0)) == 0
    said_again = capsys.readouterr()
    assert said_again.out.count("already done") == 2
    assert "already done" in said_again.err


@pytest.mark.parametrize("load", ["mmap", "read"])
def test_reading_maps_no_file_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str) -> None:
    source, store, rows = tiny_checkpoint(tmp_path / "source"), tmp_path / "store", write_rows(tmp_path / "rows.jsonl")
    mapped: list[HeldFile] = []
    mapping = HeldFile.mapped

    def watched(file: HeldFile) -> mmap.mmap:
        mapped.append(file)
        return mapping(file)

    monkeypatch.setattr(HeldFile, "mapped", watched)
    for words in (
        command("quantize", source, store, load=load),
        finetune_line(store, rows, tmp_path / "run", load=load, steps=1, eval_every=0),
        finetune_line(store, rows, tmp_path / "other", load=load, steps=1, eval_every=0, adapter=tmp_path / "run"),
        command("merge", store, tmp_path / "run", tmp_path / "merged", load=load),
        command("generate", store, adapter=tmp_path / "run", prompt="a", max_new_tokens=1, load=load),
    ):
        mapped.clear()
        assert execute(words) == 0
        assert bool(mapped) == (load == "mmap")


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is said to lie on a network disk."""
    listing = tmp_path / "mountinfo"
    far = tmp_path / "far"
    far.mkdir()
    listing.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:9 / {far} rw - nfs4 filer:/x rw\n")
    monkeypatch.setattr(loading, "_MOUNTS", listing)
    return far


@pytest.mark.parametrize("load", ["mmap", "read"])
def test_mapping_from_a_network_disk_is_noted_once_with_what_to_do(
    far: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], load: str
) -> None:
    source, rows = tiny_checkpoint(far / "source"), write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "pipeline.yaml").write_text(
        f"quantize: {{source: {source}, out: {far / 'piped'}, load: {load}}}\n"
        f"merge: {{base: {far / 'store'}, adapter: {far / 'run'}, out: {tmp_path / 'piped'}, load: {load}}}\n"
    )
    lines = {
        "quantize": command("quantize", source, far / "store", load=load),
        "finetune": finetune_line(far / "store", rows, far / "run", load=load, steps=1, eval_every=0),
        "merge": command("merge", far / "store", far / "run", tmp_path / "merged", load=load),
        "generate": command("generate", far / "store", adapter=far / "run", prompt="a", max_new_tokens=1, load=load),
        "run": command("run", tmp_path / "pipeline.yaml"),
    }
    for name, line in lines.items():
        assert execute(line) == 0
        notes = [said for said in capsys.readouterr().err.splitlines() if "network disk" in said]
        assert len(notes) == (0 if load == "read" else 2 if name == "run" else 1), name
        for note in notes:
            assert f" lies on {far}, a network disk (nfs4)" in note
            assert "--load read" in note


def test_a_model_on_a_disk_of_this_machine_is_not_noted(tmp_path: Path, far: Path) -> None:
    notes: list[str] = []
    open_model(tiny_checkpoint(tmp_path / "near"), note=notes.append)
    assert notes == []


def test_the_way_of_loading_may_change_while_a_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, rows = tiny_checkpoint(tmp_path / "source"), write_rows(tmp_path / "rows.jsonl")
    assert "load" not in SETTINGS
    assert execute(finetune_line(source, rows, tmp_path / "run", load="mmap", steps=2, eval_every=0)) == 0
    shutil.rmtree(tmp_path / "run" / "final")
    assert execute(finetune_line(source, rows, tmp_path / "run", load="read", steps=2, eval_every=0)) == 0
    assert (tmp_path / "run" / "final").is_dir()
