"""Merging on the command line: what it refuses, what it says, and that an interruption leaves no trace."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_formats import target
from qlora_pipe.artifacts import Adapter, open_model
from qlora_pipe.cli import execute
from qlora_pipe.config import MergeConfig
from qlora_pipe.plugins import load_plugins
from qlora_pipe.stages.merge import merge
from qlora_pipe.testing import tiny_checkpoint
from tests.pipe.adapters import DOWN, GATE, make_adapter


def run(*words: object) -> int:
    return execute([str(word) for word in words])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)


@pytest.fixture
def store(tmp_path: Path, base: Path) -> Path:
    assert run("quantize", base, tmp_path / "store") == 0
    return tmp_path / "store"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", {DOWN: 0.02, GATE: 0.02})


def test_merging_again_changes_nothing_and_says_so(
    store: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert run("merge", store, adapter, out) == 0
    first = capsys.readouterr()
    assert first.out.startswith(f"{out}: 2 layers merged, at least 100.0% of the adapter kept")
    assert "merge 0.1/0.1 MB" in first.err
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()}
    assert run("merge", store, adapter, out) == 0
    assert capsys.readouterr().out.startswith(f"{out}: already done, 2 layers merged, at least 100.0%")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()} == before


def test_the_same_merge_into_another_place_gives_the_same_bytes(store: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", store, adapter, tmp_path / "one") == 0
    shutil.copytree(store, tmp_path / "elsewhere")
    assert run("merge", tmp_path / "elsewhere", adapter, tmp_path / "two") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        ("merge store adapter merged --dtype float32", 'settings.dtype was "bfloat16" and is now "float32"'),
        ("merge store adapter merged --shard-mib 7", "settings.shard_mib was 4096 and is now 7"),
        ("merge store other merged", "adapter.sha256.adapter_model.safetensors was"),
        ("merge base adapter merged", "base.manifest was"),
        ("quantize base merged", "and is now absent"),
    ],
)
def test_a_merge_from_other_inputs_is_not_written_over(
    *, words: str, difference: str, store: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(tmp_path / "other", {DOWN: 0.03})
    assert run("merge", store, adapter, tmp_path / "merged") == 0
    before = contents(tmp_path / "merged")
    capsys.readouterr()
    names = {name: str(tmp_path / name) for name in ("store", "adapter", "base", "other", "merged")}
    assert run(*(names.get(word, word) for word in words.split())) == 73
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"error: {tmp_path / 'merged'} was made from other inputs or settings: ")
    assert difference in sentence
    assert contents(tmp_path / "merged") == before


@pytest.mark.parametrize(
    ("sizes", "shape", "says"),
    [
        (
            {"model.layers.2.mlp.down_proj": 0.1},
            (32, 72),
            "it adapts model.layers.2.mlp.down_proj, and the base has no",
        ),
        ({"model.layers.0.mlp.dense": 0.1}, (32, 72), "it adapts model.layers.0.mlp.dense, and the base has no"),
        ({DOWN: 0.1}, (32, 71), f"for {DOWN} it maps 71 to 32 features, and the base's weight has shape [32, 72]"),
        ({DOWN: 0.1}, (31, 72), f"for {DOWN} it maps 72 to 31 features, and the base's weight has shape [32, 72]"),
    ],
)
@pytest.mark.parametrize("kind", ["base", "store"])
def test_an_adapter_that_does_not_fit_is_refused(
    *,
    kind: str,
    sizes: dict[str, float],
    shape: tuple[int, int],
    says: str,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = make_adapter(tmp_path / "adapter", sizes, shape=shape)
    capsys.readouterr()
    assert run("merge", tmp_path / kind, adapter, tmp_path / "merged") == 65
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: the adapter does not fit this base: ")
    assert says in sentence
    assert not [path.name for path in tmp_path.iterdir() if "merged" in path.name]


def test_too_little_room_on_the_disk_is_said_before_the_work(
    store: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "free_bytes", lambda _path: 73_000)
    capsys.readouterr()
    assert run("merge", store, adapter, tmp_path / "merged") == 74
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "merged needs about 0 MiB and 0 MiB are free there" in sentence
    assert not (tmp_path / "merged").exists()
    # 36,704 weights of two bytes each.
    monkeypatch.setattr(target, "free_bytes", lambda _path: 73_408)
    assert run("merge", store, adapter, tmp_path / "merged") == 0


def test_merging_into_another_base_than_trained_on_is_noted(
    base: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("a few words to train on, and then a few more of them\n" * 20)
    words = f"finetune {store} --data text:{tmp_path / 'text.txt'} --out {tmp_path / 'run'} --steps 2"
    assert execute([*words.split(), "--learning-rate", "0.05", "--batch-size", "2", "--max-tokens", "32"]) == 0
    capsys.readouterr()
    note = "note: the adapter was trained on another base than the one it is merged into: the result is another model."
    assert run("merge", base, tmp_path / "run", tmp_path / "on the source", "--dtype", "float32") == 0
    assert capsys.readouterr().err.splitlines()[0] == note
    # The base is known by what it holds, wherever it lies.
    store.rename(tmp_path / "moved")
    assert run("merge", tmp_path / "moved", tmp_path / "run", tmp_path / "on the store", "--dtype", "float32") == 0
    assert "note" not in capsys.readouterr().err
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("on the source", "on the store"))
    assert not torch.equal(one[f"{DOWN}.weight"], other[f"{DOWN}.weight"])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("kind", ["base", "store"])
@pytest.mark.parametrize("after", [1, 9, 22, 30])
def test_an_interrupted_merge_goes_on_and_ends_with_the_same_bytes(
    kind: str, after: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Four layers of 0.7 MB in float32: a file of 1 MiB holds one of them and a part of the next.
    tiny_checkpoint(tmp_path / "base", hidden_size=128, intermediate_size=344, num_hidden_layers=3, head_dim=32)
    assert run("quantize", tmp_path / "base", tmp_path / "store") == 0
    sizes = {
        f"model.layers.{layer}.mlp.{name}_proj": 0.01 * (layer + 1) for layer in range(3) for name in ("up", "down")
    }
    adapter = make_adapter(tmp_path / "adapter", sizes, shape=(128, 344))
    words = ["--dtype", "float32", "--shard-mib", "1"]
    assert run("merge", tmp_path / kind, adapter, tmp_path / "whole", *words) == 0

    calls = 0

    def stop(_what: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        assert 0 < done <= total
        if calls == after:
            raise Stopped

    config = MergeConfig(dtype="float32", shard_mib=1)
    with pytest.raises(Stopped):
        merge(
            open_model(tmp_path / kind), Adapter.open(adapter), tmp_path / "merged", config,
            manager=load_plugins(), progress=stop,
        )  # fmt: skip
    assert not (tmp_path / "merged").exists()
    finished = {path.name: path.stat().st_ino for path in (tmp_path / ".merged.partial").glob("*.safetensors")}
    assert bool(finished) == (after > 20)
    assert run("merge", tmp_path / kind, adapter, tmp_path / "merged", *words) == 0
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert all((tmp_path / "merged" / name).stat().st_ino == inode for name, inode in finished.items())
    assert json.loads((tmp_path / "merged" / "qlora_pipe.json").read_text())["retention"].keys() == sizes.keys()


@pytest.mark.parametrize(
    ("base_name", "adapter_name", "code", "says"),
    [
        ("store", "missing", 66, "there is no folder"),
        ("missing", "adapter", 66, "there is no folder"),
        ("store", "base", 65, "is not an adapter: it has no adapter_config.json; it is a model"),
        ("adapter", "adapter", 65, "it is an adapter, which is used together with its base model"),
        ("store", "begun", 66, "is a run that has not ended; run its command again"),
    ],
)
def test_a_folder_of_another_kind_is_refused(
    *,
    base_name: str,
    adapter_name: str,
    code: int,
    says: str,
    store: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.resolved.yaml").write_text("base: store\n")
    capsys.readouterr()
    assert run("merge", tmp_path / base_name, tmp_path / adapter_name, tmp_path / "merged") == code
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert says in sentence
    assert not [path.name for path in tmp_path.iterdir() if "merged" in path.name]
