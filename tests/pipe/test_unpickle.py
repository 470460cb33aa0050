"""Checkpoints whose weights are pickles: the same store as from safetensors, whatever stops the work in between."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_formats import disk
from qlora_formats.errors import CommitError
from qlora_formats.hashing import hash_file
from qlora_formats.manifest import Manifest
from qlora_formats.target import partial_path
from qlora_pipe.cli import execute
from qlora_pipe.config import QuantizeConfig
from qlora_pipe.confined import pickles
from qlora_pipe.errors import ConfigError, DataError, MissingInputError
from qlora_pipe.plugins import load_plugins
from qlora_pipe.stages import unpickle
from qlora_pipe.stages.quantize import quantize
from qlora_pipe.stages.unpickle import open_source, unpickled
from tests.hub_server import HubServer
from tests.pipe.kill import Nursery
from tests.pipe.runs import contents, small_checkpoint

pytest_plugins = ("tests.hub_fixtures",)

Make = Callable[..., Path]


def pickled(source: Path, folder: Path, *, shards: int = 1) -> Path:
    """The same checkpoint with its weights pickled, in one file or several with an index."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names, weight_map = list(weights), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        torch.save({name: weights[name] for name in names[number::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[number::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("whole") / "source")


@pytest.fixture(scope="module")
def sharded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pickled(whole, tmp_path_factory.mktemp("sharded") / "source", shards=2)


@pytest.fixture(scope="module")
def expected(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store made from safetensors, without its manifest."""
    store = tmp_path_factory.mktemp("expected") / "store"
    assert execute(["quantize", str(whole), str(store)]) == 0
    return weights_of(store)


def weights_of(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(store).items() if name != "qlora_pipe.json"}


@pytest.fixture
def unconfined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Read pickles in this process, which takes milliseconds; gives the names of those that were read."""
    read: list[str] = []

    def run(task: str, request: Any, *, what: str, limits: Any, write: Any, file: Any) -> None:
        assert task == pickles.__name__
        read.append(Path(file.name).name)
        pickles.prepare(request, file)(lambda data: write(bytes(data)))

    monkeypatch.setattr(unpickle, "run_confined", run)
    return read


@pytest.mark.parametrize("shards", [1, 2], ids="shards={}".format)
def test_pickles_and_safetensors_of_the_same_weights_give_the_same_store(
    whole: Path, expected: dict[str, bytes], tmp_path: Path, shards: int
) -> None:
    source = pickled(whole, tmp_path / "source", shards=shards)
    assert execute(["quantize", str(source), str(tmp_path / "store"), "--allow-pickle"]) == 0
    assert weights_of(tmp_path / "store") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "store"]
    inputs = Manifest.read(tmp_path / "store").inputs
    files = [source / "config.json", *source.glob("*.bin")]
    assert inputs["source"] == {"sha256": {path.name: hash_file(path).sha256 for path in files}}
    assert "allow_pickle" not in inputs["settings"]


@pytest.mark.usefixtures("unconfined")
def test_a_pipeline_reads_pickles_where_it_says_so(
    sharded: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for allowed in ("false", "true"):
        (tmp_path / f"{allowed}.yaml").write_text(
            f"quantize: {{source: {sharded}, out: {tmp_path / 'store'}, allow_pickle: {allowed}}}\n"
        )
    assert execute(["run", str(tmp_path / "false.yaml")]) == 65
    assert "quantize with --allow-pickle" in capsys.readouterr().err
    assert execute(["run", str(tmp_path / "true.yaml")]) == 0
    assert weights_of(tmp_path / "store") == expected


def test_where_there_are_safetensors_too_those_are_read(whole: Path, unconfined: list[str], tmp_path: Path) -> None:
    source = pickled(whole, tmp_path / "source")
    shutil.copy(whole / "model.safetensors", source)
    for name, folder, flags in (("plain", whole, []), ("both", source, ["--allow-pickle"])):
        assert execute(["quantize", str(folder), str(tmp_path / name), *flags]) == 0
    assert contents(tmp_path / "plain") == contents(tmp_path / "both")
    assert unconfined == []


def test_a_store_that_is_finished_is_compared_without_reading_a_pickle(
    sharded: Path, unconfined: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(sharded), str(tmp_path / "store"), "--allow-pickle", "--keep", "down_proj"]
    assert execute(command) == 0
    unconfined.clear()
    assert execute(command) == 0
    assert "already done" in capsys.readouterr().out
    assert execute([*command, "--block-size", "128"]) == 73
    assert unconfined == []


class Stop(BaseException):
    """The process is gone."""


EFFECTS = ("_write", "_fsync", "_rename", "_unlink", "_mkdir", "_rmdir")


class Moments:
    """Counts the effects on the disk and stops before the chosen one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        for name in EFFECTS:
            monkeypatch.setattr(disk, name, self._watched(getattr(disk, name) if name != "_fsync" else lambda _: None))

    def _watched(self, effect: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == -1:
                raise Stop
            return effect(*arguments)

        return watched


def make(source: Path, out: Path) -> None:
    with open_source(
        str(source), out, QuantizeConfig(allow_pickle=True), progress=lambda _what, _done, _total: None
    ) as checkpoint:
        quantize(checkpoint, out, QuantizeConfig(), manager=load_plugins())


def test_stopped_before_any_effect_on_the_disk_and_rerun_it_ends_with_the_same_bytes(
    sharded: Path, unconfined: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = Moments(monkeypatch)
    make(sharded, tmp_path / "store")
    whole = contents(tmp_path)
    stopped = 0
    while True:
        shutil.rmtree(tmp_path)
        moments.left = stopped
        try:
            make(sharded, tmp_path / "store")
            break
        except Stop:
            stopped += 1
        unconfined.clear()
        scratch = tmp_path / ".store.unpickled"
        finished = [*scratch.glob("*.safetensors"), *partial_path(scratch).glob("model-*.safetensors")]
        make(sharded, tmp_path / "store")
        assert contents(tmp_path) == whole
        # Shards that were finished are not read again.
        assert len(unconfined) <= 2 - len(finished)
    assert stopped > 100


@pytest.fixture
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("logs")) as nursery:
        yield nursery


def test_killed_while_a_pickle_is_read_and_rerun_it_ends_with_the_same_bytes(
    sharded: Path, expected: dict[str, bytes], nursery: Nursery, tmp_path: Path
) -> None:
    command = ["quantize", str(sharded), str(tmp_path / "store"), "--allow-pickle"]
    scratch = tmp_path / ".store.unpickled"
    child = nursery.start(command)
    child.wait_until((partial_path(scratch) / "model-00001-of-00002.safetensors").exists)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    first = (partial_path(scratch) / "model-00001-of-00002.safetensors").stat().st_ino
    again = nursery.start(command)
    again.wait_until((scratch / "model-00001-of-00002.safetensors").exists)
    assert (scratch / "model-00001-of-00002.safetensors").stat().st_ino == first
    assert again.wait() == 0
    assert weights_of(tmp_path / "store") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_scratch_folder_of_another_source_is_in_the_way(
    sharded: Path, whole: Path, unconfined: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ZeroDivisionError), unpickled(str(sharded), scratch=tmp_path / "scratch"):
        raise ZeroDivisionError
    assert (tmp_path / "scratch" / "qlora_pipe.json").exists()
    unconfined.clear()
    other = pickled(whole, tmp_path / "other")
    with (
        pytest.raises(CommitError, match="was made from other inputs"),
        unpickled(str(other), scratch=tmp_path / "scratch"),
    ):
        pass
    with unpickled(str(sharded), scratch=tmp_path / "scratch") as checkpoint:
        assert checkpoint.weights.names
    assert unconfined == []
    assert not (tmp_path / "scratch").exists()


@pytest.mark.usefixtures("unconfined")
def test_the_checkpoint_is_known_by_its_pickles(sharded: Path, whole: Path, tmp_path: Path) -> None:
    with unpickled(str(sharded), scratch=tmp_path / "scratch") as checkpoint:
        exact = load_file(whole / "model.safetensors")
        assert set(checkpoint.weights.names) == set(exact)
        assert all(torch.equal(checkpoint.weights.tensor(name), exact[name]) for name in exact)
        assert checkpoint.config == json.loads((whole / "config.json").read_text())
        assert [path.name for path in checkpoint.tokenizer_files] == ["tokenizer.json", "tokenizer_config.json"]
        files = [sharded / "config.json", *sharded.glob("*.bin")]
        assert checkpoint.identity == {"sha256": {path.name: hash_file(path).sha256 for path in files}}


def test_a_pickle_that_changes_while_it_is_read_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pickled(whole, tmp_path / "source")

    def run(*_: Any, file: Any, write: Any, **__: Any) -> None:
        pickles.prepare({}, file)(lambda data: write(bytes(data)))
        (source / "pytorch_model.bin").write_bytes(b"other")

    monkeypatch.setattr(unpickle, "run_confined", run)
    with (
        pytest.raises(DataError, match=r"pytorch_model\.bin was changed while it was read"),
        unpickled(str(source), scratch=tmp_path / "scratch"),
    ):
        pass


@pytest.mark.usefixtures("unconfined")
def test_a_shard_must_hold_what_its_index_says(whole: Path, tmp_path: Path) -> None:
    source = pickled(whole, tmp_path / "source", shards=2)
    shard = source / "pytorch_model-00002-of-00002.bin"
    torch.save({"stray": torch.ones(1)}, shard)
    with (
        pytest.raises(Exception, match=r"00002\.bin holds the tensor 'stray', which pytorch_model\.bin\.index\.json"),
        unpickled(str(source), scratch=tmp_path / "scratch"),
    ):
        pass


@pytest.mark.usefixtures("unconfined")
def test_room_is_asked_for_before_a_pickle_is_read(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unconfined: list[str]
) -> None:
    monkeypatch.setattr("qlora_formats.target.free_bytes", lambda _: 2**10)
    with pytest.raises(CommitError, match="MiB are free there"), unpickled(str(sharded), scratch=tmp_path / "scratch"):
        pass
    assert unconfined == []


def test_an_older_torch_is_refused(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with (
        pytest.raises(ConfigError, match=r"torch 2\.10\.1\+cpu is installed, and pickles are read with torch 2\.11"),
        unpickled(str(sharded), scratch=tmp_path / "scratch"),
    ):
        pass


def test_a_hub_model_of_pickles_is_known_by_its_commit_and_refused_without_the_flag(
    hub: HubServer, sharded: Path, unconfined: list[str], tmp_path: Path
) -> None:
    commit = hub.add("someone/old", {path.name: path.read_bytes() for path in sharded.iterdir()})
    with (
        pytest.raises(MissingInputError, match=r"'someone/old' holds no safetensors; .* add --allow-pickle"),
        open_source("someone/old", tmp_path / "store", QuantizeConfig(), progress=lambda *_: None),
    ):
        pass
    assert hub.count(r"GET .*/resolve/.*\.bin$") == 0
    with unpickled("someone/old", scratch=tmp_path / "scratch") as checkpoint:
        assert checkpoint.identity["repo"] == "someone/old"
        assert checkpoint.identity["revision"] == commit
        assert len(checkpoint.identity["sha256"]) == 3
        assert checkpoint.hub_name == "someone/old"
    assert len(unconfined) == 2
