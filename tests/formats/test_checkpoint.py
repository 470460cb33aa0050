"""Hugging Face model folders, read and written; transformers' own view is tested in tests/interop."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_formats.checkpoint import CheckpointFolder, write_checkpoint
from qlora_formats.commit import commit_folder
from qlora_formats.errors import FormatError
from qlora_formats.manifest import Manifest

CONFIG = {"model_type": "llama", "dtype": "float32", "vocab_size": 50}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"embed.weight": (50, 7), "layers.0.w": (300, 700), "layers.1.w": (300, 700), "norm.weight": (7,)}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def write(target: Path, tensors: dict[str, torch.Tensor], *, shard_mib: int = 4096) -> Manifest:
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with commit_folder(target, kind="checkpoint", inputs={}) as folder:
        write_checkpoint(folder, config=CONFIG, tensors=layout, produce=tensors.__getitem__, shard_mib=shard_mib)
        return folder.finish()


def test_a_small_model_is_one_file_and_comes_back(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write(tmp_path / "out", tensors)
    folder = CheckpointFolder.open(tmp_path / "out")
    assert folder.names == list(tensors)
    assert folder.config == CONFIG
    assert folder.generation_config == {}
    assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in tensors.items())
    assert [shard.name for shard in folder.shards] == ["model.safetensors"]
    with safe_open(folder.shards[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_model_is_sharded_with_an_index(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    manifest = write(tmp_path / "out", tensors, shard_mib=0)
    names = [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"] == dict(zip(tensors, names, strict=True))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert manifest.files.keys() == {*names, "config.json", "model.safetensors.index.json"}
    folder = CheckpointFolder.open(tmp_path / "out")
    assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in tensors.items())
    assert folder.info("layers.1.w")[:2] == (torch.bfloat16, (300, 700))
    assert folder.manifest == manifest


class Stop(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("stop_at", range(4))
def test_a_stopped_write_goes_on_behind_the_finished_shards(
    tmp_path: Path, tensors: dict[str, torch.Tensor], stop_at: int
) -> None:
    write(tmp_path / "reference", tensors, shard_mib=0)
    asked: list[str] = []

    class Stopping(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            if len(asked) == stop_at:
                raise Stop
            asked.append(name)
            return super().__getitem__(name)

    with suppress(Stop):
        write(tmp_path / "out", Stopping(tensors), shard_mib=0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FormatError, match="out is unfinished: rerun the command that was writing it"):
        CheckpointFolder.open(tmp_path / "out")
    stop_at = -1
    write(tmp_path / "out", Stopping(tensors), shard_mib=0)
    assert asked == list(tensors)
    for path in (tmp_path / "reference").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_belongs_to_a_model_is_carried_and_nothing_else(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    carried = ["LICENSE.txt", "NOTICE", "added_tokens.json", "chat_template.jinja", "generation_config.json"]
    carried += [
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
    ]
    for name in [*carried, "config.json", "README.md", "train.py", "pytorch_model.bin"]:
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer_folder").mkdir()
    assert [path.name for path in CheckpointFolder.open(tmp_path).carried_files()] == sorted(carried)


def test_a_manifest_beside_a_model_is_checked_against_it(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write(tmp_path / "out", tensors)
    (tmp_path / "out" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(FormatError, match=r"config\.json has 20 bytes where qlora_pipe\.json says"):
        CheckpointFolder.open(tmp_path / "out")


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0a1b2c"
    write(tmp_path / "made", tensors, shard_mib=0)
    snapshot.mkdir(parents=True)
    (tmp_path / "made" / "tokenizer.json").write_text("{}")
    for n, path in enumerate(sorted((tmp_path / "made").iterdir())):
        path.rename(cache / "blobs" / str(n))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(n))
    folder = CheckpointFolder.open(snapshot)
    assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in tensors.items())
    assert [path.name for path in folder.carried_files()] == ["tokenizer.json"]


def test_a_real_model_is_read_as_the_library_reads_it(shared_data: Path) -> None:
    path = shared_data / "models" / "stories260K"
    folder, raw = CheckpointFolder.open(path), load_file(path / "model.safetensors")
    assert sorted(folder.names) == sorted(raw)
    assert all(torch.equal(folder.tensor(name), raw[name]) for name in raw)
    assert folder.config["model_type"] == "llama"
    assert "eos_token_id" in folder.generation_config
