"""Malformed model folders: each gives one sentence that names the file and what is wrong with it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_formats.adapter import AdapterFolder
from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.store import Store, is_store
from tests.hostile.damage import (
    INDEX,
    SHARDS,
    Damage,
    edit,
    fails,
    link,
    link_out,
    remove,
    replace,
    together,
    write,
    write_sharded_model,
)

FIRST, SECOND = SHARDS
ONE_FILE = "model.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded_model(tmp_path / "model")


def place(tensor: str, name: object) -> Damage:
    return edit(INDEX, lambda index: index["weight_map"].update({tensor: name}))


def rename(old: str, new: str) -> Damage:
    return lambda path: (path / old).rename(path / new)


def sparse(n_bytes: int) -> Damage:
    """A file of that many zeros, which take no room on the disk."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, n_bytes)

    return make


CONFIGS: dict[str, tuple[Damage, str]] = {
    "absent": (remove("config.json"), "is not a model: it has no config.json"),
    "empty": (write("config.json", ""), "config.json is not valid JSON"),
    "cut off": (write("config.json", '{"a": 1'), "config.json is not valid JSON"),
    "a list": (write("config.json", "[1]"), "config.json holds a JSON list where an object is needed"),
    "null": (write("config.json", "null"), "config.json holds a JSON null where an object is needed"),
    "two objects": (write("config.json", "{}{}"), "config.json is not valid JSON: Extra data"),
    "of NaN": (write("config.json", '{"rope_theta": NaN}'), "NaN is not a JSON number"),
    "of 1e999": (write("config.json", '{"rope_theta": 1e999}'), "1e999 is too large a number"),
    "of 400 digits": (write("config.json", '{"a": 1' + "0" * 400 + "}"), f"1{'0' * 39}... is too large a number"),
    "of 5,000 digits": (write("config.json", '{"a": ' + "9" * 5000 + "}"), f"{'9' * 40}... is too large a number"),
    "key twice": (write("config.json", '{"a": 1, "a": 2}'), "the key 'a' stands twice"),
    "the last of many keys twice": (
        write("config.json", "{" + "".join(f'"{n}":0,' for n in range(200_000)) + '"199999":0}'),
        "the key '199999' stands twice",
    ),
    "not UTF-8": (write("config.json", b'{"a": "\xff"}'), "config.json is not UTF-8 text (byte 7)"),
    "of UTF-16": (write("config.json", '{"a": 1}'.encode("utf-16")), "config.json is not UTF-8 text (byte 0)"),
    "after a byte order mark": (write("config.json", b"\xef\xbb\xbf{}"), "config.json is not valid JSON"),
    "deep": (write("config.json", '{"a":' * 99_999), "config.json is not valid JSON: it is nested too deeply"),
    "deep lists": (write("config.json", '{"a":' + "[" * 99_999), "config.json is not valid JSON: it is nested too"),
    "half a pair": (write("config.json", '{"a": "\\udc00"}'), "holds half of a surrogate pair"),
    "of millions of lists": (
        write("config.json", '{"a":[' + "[]," * 3_000_000 + "[]]}"),
        "config.json has more than the 524,288 values that such a file may have",
    ),
    "too large": (
        replace("config.json", sparse(16 * 2**20 + 1)),
        "config.json is larger than the 16,777,216 bytes that such a file may have",
    ),
    "a folder": (replace("config.json", Path.mkdir), "config.json is a folder where a file is needed"),
    "a pipe": (replace("config.json", os.mkfifo), "config.json is a pipe or a device where a file is needed"),
    "a device": (replace("config.json", link("/dev/zero")), "config.json is a pipe or a device where a file is needed"),
    "a link to nothing": (replace("config.json", link("gone")), "config.json is a link to nothing where a file is"),
    "a link to itself": (replace("config.json", link("config.json")), "config.json is a link to nothing where a file"),
    "a link out": (lambda path: link_out(path / "config.json"), "config.json is a link that leads out of its folder"),
    "of generation broken": (write("generation_config.json", "{,}"), "generation_config.json is not valid JSON"),
    "of generation a list": (write("generation_config.json", "[]"), "generation_config.json holds a JSON list where"),
    "of generation with NaN": (
        write("generation_config.json", '{"temperature": NaN}'),
        "generation_config.json is not valid JSON: NaN is not a JSON number",
    ),
    "of generation a folder": (
        lambda path: (path / "generation_config.json").mkdir(),
        "generation_config.json is a folder where a file is needed",
    ),
    "of generation a link to nothing": (
        lambda path: (path / "generation_config.json").symlink_to("gone"),
        "generation_config.json is a link to nothing where a file is needed",
    ),
    "of an adapter alone": (
        together(remove("config.json"), write("adapter_config.json", "{}")),
        "it is an adapter, which is used together with its base model",
    ),
}

INDEXES: dict[str, tuple[Damage, str]] = {
    "absent": (remove(INDEX), f"holds no weights: neither model.safetensors nor {INDEX}"),
    "broken": (write(INDEX, "{"), f"{INDEX} is not valid JSON"),
    "a list": (write(INDEX, "[]"), f"{INDEX} holds a JSON list where an object is needed"),
    "a folder": (replace(INDEX, Path.mkdir), f"{INDEX} is a folder where a file is needed"),
    "a link out": (lambda path: link_out(path / INDEX), f"{INDEX} is a link that leads out of its folder"),
    "without a map": (write(INDEX, "{}"), f"{INDEX} has no weight_map from tensors to files"),
    "of an empty map": (write(INDEX, '{"weight_map": {}}'), f"{INDEX} has no weight_map"),
    "of a list": (write(INDEX, '{"weight_map": []}'), f"{INDEX} has no weight_map"),
    "of two maps": (write(INDEX, '{"weight_map": {"a": "b"}, "weight_map": {}}'), "the key 'weight_map' stands twice"),
    "of a tensor twice": (
        write(INDEX, f'{{"weight_map": {{"x": "{FIRST}", "x": "{SECOND}"}}}}'),
        "the key 'x' stands twice",
    ),
    "of too many tensors": (
        lambda path: (path / INDEX).write_text(json.dumps({"weight_map": {f"t{n}": FIRST for n in range(600_000)}})),
        f"{INDEX} has more than the 524,288 values that such a file may have",
    ),
    "too large": (replace(INDEX, sparse(64 * 2**20 + 1)), f"{INDEX} is larger than the 67,108,864 bytes that such"),
    "large and not of ASCII": (
        write(INDEX, '{"weight_map": {"\U0001f600": "' + "x" * 2**24 + '"}}'),
        f"{INDEX} is larger than 16,777,216 bytes, and not all of it is plain ASCII",
    ),
    "large and of escapes": (
        write(INDEX, '{"weight_map": {"\\ud83d\\ude00": "' + "x" * 2**24 + '"}}'),
        f"{INDEX} is larger than 16,777,216 bytes, and not all of it is plain ASCII",
    ),
    "file name a number": (place("x", 3), f"{INDEX} places the tensor 'x' in '3', which is no file name"),
    "file name null": (place("x", None), f"{INDEX} places the tensor 'x' in 'None', which is no file name"),
    "file name a list": (place("x", [FIRST]), f"in \"['{FIRST}']\", which is no file name"),
    "file name empty": (place("x", ""), f"{INDEX} places the tensor 'x' in '', which is no file name"),
    "file in the folder above": (place("x", "../secret.safetensors"), "'../secret.safetensors', which is no file name"),
    "file in a folder below": (place("x", "a/b.safetensors"), "in 'a/b.safetensors', which is no file name"),
    "file by an absolute path": (place("x", "/etc/passwd"), "in '/etc/passwd', which is no file name"),
    "the folder itself": (place("x", "."), "in '.', which is no file name"),
    "the folder above": (place("x", ".."), "in '..', which is no file name"),
    "a hidden file": (place("x", ".ssh"), "in '.ssh', which is no file name"),
    "file name of control bytes": (place("x", "a\u0000b"), r"in 'a\x00b', which is no file name"),
    "file name of two lines": (place("x", "a\nb"), r"in 'a\nb', which is no file name"),
    "file name that turns text around": (place("x", "a\u202eb"), r"in 'a\u202eb', which is no file name"),
    "file name of 256 bytes": (place("x", "n" * 256), f"in '{'n' * 80}', which is no file name"),
    "itself as a shard": (place("x", INDEX), f"{INDEX} is cut off or not a safetensors file"),
}

WEIGHTS: dict[str, tuple[Damage, str]] = {
    "shard missing": (remove(SECOND), f"lacks the shard {SECOND} that {INDEX} names: fetch or make the folder again"),
    "shard empty": (write(SECOND, ""), f"{SECOND} is not a safetensors file: it has 0 bytes, too few for a header"),
    "shard a text": (write(SECOND, "Not found, sorry."), f"{SECOND} is cut off or not a safetensors file"),
    "shard cut off": (lambda path: os.truncate(path / SECOND, 70), f"{SECOND} is cut off"),
    "shard a folder": (replace(SECOND, Path.mkdir), f"{SECOND} is a folder where a file is needed"),
    "shard a pipe": (replace(SECOND, os.mkfifo), f"{SECOND} is a pipe or a device where a file is needed"),
    "shard a device": (replace(SECOND, link("/dev/zero")), f"{SECOND} is a pipe or a device where a file is needed"),
    "shard a link to nothing": (replace(SECOND, link("gone")), f"{SECOND} is a link to nothing where a file is needed"),
    "shard a link to itself": (replace(SECOND, link(SECOND)), f"{SECOND} is a link to nothing where a file is needed"),
    "shard a link out": (lambda path: link_out(path / FIRST), f"{FIRST} is a link that leads out of its folder"),
    "the one file empty": (write(ONE_FILE, ""), f"{ONE_FILE} is not a safetensors file: it has 0 bytes"),
    "the one file a folder": (lambda path: (path / ONE_FILE).mkdir(), f"{ONE_FILE} is a folder where a file is needed"),
    "the one file a pipe": (lambda path: os.mkfifo(path / ONE_FILE), f"{ONE_FILE} is a pipe or a device where a file"),
    "the one file a link out": (
        together(lambda path: save_file({"x": torch.ones(1)}, path / ONE_FILE), lambda path: link_out(path / ONE_FILE)),
        f"{ONE_FILE} is a link that leads out of its folder",
    ),
    "tensor the shard lacks": (place("ghost", FIRST), f"{FIRST} lacks the tensor 'ghost' that {INDEX} places there"),
    "tensor the index lacks": (
        lambda path: save_file({"extra": torch.ones(1), "layers.2.weight": torch.ones(2)}, path / SECOND),
        f"holds the tensor 'extra', which {INDEX} places nowhere",
    ),
    "tensor in another shard": (
        lambda path: save_file({"layers.1.weight": torch.ones(1), "layers.2.weight": torch.ones(2)}, path / SECOND),
        f"holds the tensor 'layers.1.weight', which {INDEX} places in {FIRST}",
    ),
    "shards swapped": (
        together(rename(FIRST, "x"), rename(SECOND, FIRST), rename("x", SECOND)),
        f"{FIRST} holds the tensor 'layers.2.weight', which {INDEX} places in {SECOND}",
    ),
    "tokenizer a link out": (
        lambda path: (path / "tokenizer.json").symlink_to("/etc/hostname"),
        "tokenizer.json is a link that leads out of its folder",
    ),
}

MODELS = {
    f"{what} {case}": row
    for what, table in (("config", CONFIGS), ("index", INDEXES), ("weights", WEIGHTS))
    for case, row in table.items()
}


@pytest.mark.parametrize("case", MODELS)
def test_a_malformed_model_folder_gives_one_sentence(sharded: Path, case: str) -> None:
    damage, sentence = MODELS[case]
    CheckpointFolder.open(sharded)
    damage(sharded)
    fails(lambda path: CheckpointFolder.open(path).carried_files(), sharded, sentence)


def test_an_only_pickle_is_named_where_the_weights_should_be(sharded: Path) -> None:
    together(remove(INDEX), write("pytorch_model.bin", b"\x80\x02"))(sharded)
    fails(
        CheckpointFolder.open,
        sharded,
        "its weights are pickles (pytorch_model.bin), and loading one can run code: convert",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("name", ["config.json", INDEX, SECOND])
def test_a_file_that_may_not_be_read_is_named(sharded: Path, name: str) -> None:
    (sharded / name).chmod(0)
    fails(CheckpointFolder.open, sharded, f"cannot read {sharded / name}: Permission denied")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_entered_is_named(sharded: Path) -> None:
    sharded.chmod(0o600)
    try:
        fails(CheckpointFolder.open, sharded, f"cannot read {sharded / 'config.json'}: Permission denied")
    finally:
        sharded.chmod(0o700)


@pytest.mark.parametrize(
    "total_size", [{}, {"total_size": 1}, {"total_size": "x"}, {"total_size": 2.5e9}, None], ids=str
)
def test_the_total_that_an_index_states_is_not_relied_on(sharded: Path, total_size: object) -> None:
    # Published indexes state wrong ones, and nothing is decided by it: the sizes that count are in the headers.
    edit(INDEX, lambda index: index.update(metadata=total_size))(sharded)
    assert CheckpointFolder.open(sharded).names == ["layers.1.weight", "layers.2.weight"]


def test_one_file_counts_where_an_index_lies_beside_it(sharded: Path) -> None:
    save_file({"one": torch.ones(1)}, sharded / ONE_FILE)
    write(INDEX, "not even JSON")(sharded)
    assert CheckpointFolder.open(sharded).names == ["one"]


def test_a_link_within_the_folder_is_followed(sharded: Path) -> None:
    (sharded / FIRST).rename(sharded / "first.safetensors")
    (sharded / FIRST).symlink_to("first.safetensors")
    assert CheckpointFolder.open(sharded).names == ["layers.1.weight", "layers.2.weight"]


@pytest.mark.parametrize("open_folder", [CheckpointFolder.open, Store.open, AdapterFolder.open, is_store])
def test_what_is_no_folder_gives_one_sentence(tmp_path: Path, open_folder: Callable[[Path], object]) -> None:
    fails(open_folder, tmp_path / "absent", "there is no folder")
    (tmp_path / "file").write_text("x")
    fails(open_folder, tmp_path / "file", "is a file where a folder is needed")
    os.mkfifo(tmp_path / "pipe")
    fails(open_folder, tmp_path / "pipe", "is a file where a folder is needed")
    (tmp_path / "loop").symlink_to("loop")
    fails(open_folder, tmp_path / "loop", "there is no folder")
    (tmp_path / ".out.partial").mkdir()
    fails(open_folder, tmp_path / "out", "out is unfinished: rerun the command that was writing it")
