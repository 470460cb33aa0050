"""Manifests and journals that are damaged, or well made and wrong: each gives one sentence, and nothing is believed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qlora_formats.adapter import AdapterFolder
from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.commit import commit_folder
from qlora_formats.errors import CommitError
from qlora_formats.manifest import Manifest
from tests.hostile.damage import (
    ADAPTER_FIELDS,
    Damage,
    adapter_tensors,
    edit,
    fails,
    link,
    link_out,
    remove,
    replace,
    resign,
    together,
    write,
    write_adapter_folder,
    write_sharded_model,
)

NAME = "qlora_pipe.json"
RECORD = {"bytes": 3, "sha256": "0" * 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished folder of two files."""
    with commit_folder(tmp_path / "done", kind="store", inputs={"settings": {"block_size": 64}}) as work:
        work.write("one.txt", b"one")
        with work.create("two.txt") as stream:
            stream.write(b"two")
            stream.facts["tensors"] = {"w": {"sha256": "1" * 64, "relative_error": 0.09}}
        work.finish()
    return tmp_path / "done"


def record(**changes: Any) -> Damage:
    """Change what the manifest says of `two.txt`."""
    return resign(lambda manifest: manifest["files"]["two.txt"].update(changes))


def facts(value: object) -> Damage:
    return record(facts={"tensors": value})


def named(name: str) -> Damage:
    return resign(lambda manifest: manifest["files"].update({name: RECORD}))


def field(**changes: Any) -> Damage:
    return resign(lambda manifest: manifest.update(changes))


MALFORMED = f"{NAME}: the record of file 'two.txt' is malformed"
MANIFESTS: dict[str, tuple[Damage, str]] = {
    "empty": (write(NAME, ""), f"{NAME} is not valid JSON"),
    "a list": (write(NAME, "[]"), f"{NAME} holds a JSON list where an object is needed"),
    "not UTF-8": (write(NAME, b'{"\xff": 1}'), f"{NAME} is not UTF-8 text (byte 2)"),
    "deep": (write(NAME, '{"a":' * 9999), f"{NAME} is not valid JSON: it is nested too deeply"),
    "key twice": (write(NAME, '{"kind": 1, "kind": 2}'), "the key 'kind' stands twice"),
    "of millions of values": (
        write(NAME, '{"a": [' + "0," * 600_000 + "0]}"),
        f"{NAME} has more than the 524,288 values that such a file may have",
    ),
    "a folder": (replace(NAME, Path.mkdir), f"{NAME} is a folder where a file is needed"),
    "a pipe": (replace(NAME, os.mkfifo), f"{NAME} is a pipe or a device where a file is needed"),
    "a link to nothing": (replace(NAME, link("gone")), f"{NAME} is a link to nothing where a file is needed"),
    "a link out": (lambda path: link_out(path / NAME), f"{NAME} is a link that leads out of its folder"),
    "of another program": (field(format="other"), f"{NAME} is not a manifest of qlora-pipe (its format is 'other')"),
    "of no format": (write(NAME, "{}"), f"{NAME} is not a manifest of qlora-pipe (its format is None)"),
    "version 2": (field(version=2), f"{NAME} has format version 2 and this program reads 1: update qlora-pipe"),
    "version 1.0": (field(version=1.0), f"{NAME} has format version 1.0 and this program reads 1"),
    "version true": (field(version=True), f"{NAME} has format version True and this program reads 1"),
    "edited": (edit(NAME, lambda value: value.update(kind="adapter")), f"{NAME} does not have the digest that it"),
    "digest gone": (edit(NAME, lambda value: value.pop("digest")), f"{NAME} does not have the digest that it records"),
    "digest a number": (edit(NAME, lambda value: value.update(digest=0)), f"{NAME} does not have the digest that it"),
    "kind unknown": (field(kind="x"), f"{NAME} lacks a known kind, the inputs or the files"),
    "kind a list": (field(kind=["store"]), f"{NAME} lacks a known kind, the inputs or the files"),
    "inputs a list": (field(inputs=[]), f"{NAME} lacks a known kind, the inputs or the files"),
    "files a list": (field(files=[]), f"{NAME} lacks a known kind, the inputs or the files"),
    "file above": (named("../x"), f"{NAME}: the record of file '../x' is malformed"),
    "file by an absolute path": (named("/etc/passwd"), f"{NAME}: the record of file '/etc/passwd' is malformed"),
    "file hidden": (named(".x"), f"{NAME}: the record of file '.x' is malformed"),
    "file of no name": (named(""), f"{NAME}: the record of file '' is malformed"),
    "file of two lines": (named("a\nb"), rf"{NAME}: the record of file 'a\nb' is malformed"),
    "record null": (resign(lambda manifest: manifest["files"].update({"two.txt": None})), MALFORMED),
    "record with more": (record(mode=0o644), MALFORMED),
    "size negative": (record(bytes=-1), MALFORMED),
    "size true": (record(bytes=True), MALFORMED),
    "size a float": (record(bytes=3.0), MALFORMED),
    "hash short": (record(sha256="0" * 63), MALFORMED),
    "hash in capitals": (record(sha256="A" * 64), MALFORMED),
    "hash null": (record(sha256=None), MALFORMED),
    "facts a list": (record(facts=[]), MALFORMED),
    "facts of tensors a list": (facts([]), MALFORMED),
    "facts of a tensor a number": (facts({"w": 5}), MALFORMED),
    "facts of a hash that is none": (facts({"w": {"sha256": 5}}), MALFORMED),
    "facts of an error that is text": (facts({"w": {"relative_error": "0.1"}}), MALFORMED),
    "facts of an error that is true": (facts({"w": {"relative_error": True}}), MALFORMED),
    "facts of an error below 0": (facts({"w": {"relative_error": -0.1}}), MALFORMED),
    "file missing": (remove("two.txt"), f"lacks the file two.txt that its {NAME} names: make or fetch it again"),
    "file a folder": (replace("two.txt", Path.mkdir), "two.txt is a folder where a file is needed"),
    "file a link out": (lambda path: link_out(path / "two.txt"), "two.txt is a link that leads out of its folder"),
    "file longer": (write("two.txt", "two and more"), f"two.txt has 12 bytes where {NAME} says 3: it was changed"),
    "file empty": (write("two.txt", ""), f"two.txt has 0 bytes where {NAME} says 3: it was changed or cut off"),
    "file changed": (write("two.txt", "Two"), f"two.txt does not have the sha256 that {NAME} records: its bytes were"),
    "file of itself": (named(NAME), f"where {NAME} says 3: it was changed or cut off"),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_wrong_gives_one_sentence(folder: Path, case: str) -> None:
    damage, sentence = MANIFESTS[case]
    Manifest.read(folder).verify(folder)
    damage(folder)
    fails(lambda path: Manifest.read(path).verify(path), folder, sentence)


def test_a_manifest_of_another_kind_does_not_vouch_for_a_folder(tmp_path: Path, folder: Path) -> None:
    model = write_sharded_model(tmp_path / "model")
    adapter = write_adapter_folder(tmp_path / "adapter", ADAPTER_FIELDS, adapter_tensors())
    text = (folder / NAME).read_text()
    for path, kind, open_folder, wanted in (
        (model, "adapter", CheckpointFolder.open, "store or checkpoint"),
        (model, "training", CheckpointFolder.open, "store or checkpoint"),
        (adapter, "store", AdapterFolder.open, "adapter"),
    ):
        together(write(NAME, text), field(kind=kind, files={}))(path)
        fails(open_folder, path, f"{NAME} says that the folder is of kind {kind}, not {wanted}")  # type: ignore[arg-type]


HEAD = b'{"inputs":{"settings":{"block_size":64}},"kind":"store"}\n'
LINE = b'{"bytes":3,"name":"one.txt","sha256":"7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"}\n'

JOURNALS: dict[str, tuple[bytes, str]] = {
    "a list": (b"[]\n", "the first line of"),
    "not UTF-8": (b"\xff\n", "is not UTF-8 text (byte 0)"),
    "deep": (b'{"a":' * 9999 + b"\n", "it is nested too deeply"),
    "key twice": (b'{"kind":"store","kind":"store"}\n', "the key 'kind' stands twice"),
    "of no inputs": (b'{"kind":"store"}\n', "its first line lacks kind and inputs"),
    "of inputs that are none": (b'{"inputs":[],"kind":"store"}\n', "its first line lacks kind and inputs"),
    "of a kind that is none": (b'{"inputs":{},"kind":5}\n', "its first line lacks kind and inputs"),
    "of another kind": (HEAD.replace(b"store", b"x"), 'kind was "x" and is now "store"'),
    "of other inputs": (HEAD.replace(b"64", b"32"), "settings.block_size was 32 and is now 64"),
    "of millions of values": (b'{"inputs":{"a":[' + b"0," * 600_000 + b'0]},"kind":"store"}\n', "has more than the"),
}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """An unfinished folder whose first file is done."""
    with commit_folder(tmp_path / "out", kind="store", inputs={"settings": {"block_size": 64}}) as work:
        work.write("one.txt", b"one")
    partial = tmp_path / ".out.partial"
    assert (partial / "journal.jsonl").read_bytes() == HEAD + LINE
    return partial


def go_on(partial: Path) -> list[str]:
    """Continue an unfinished folder to its end; gives what was already done in it."""
    target = partial.with_name("out")
    with commit_folder(target, kind="store", inputs={"settings": {"block_size": 64}}) as work:
        found = list(work.done)
        for name in ("one.txt", "two.txt"):
            if name not in work.done:
                work.write(name, name[:3].encode())
        work.finish()
    Manifest.read(target).verify(target)
    assert sorted(path.name for path in target.iterdir()) == ["one.txt", NAME, "two.txt"]
    assert not any(path.is_symlink() for path in target.iterdir())
    return found


@pytest.mark.parametrize("case", JOURNALS)
def test_a_journal_that_is_not_this_ones_stops_the_writer(begun: Path, case: str) -> None:
    data, sentence = JOURNALS[case]
    (begun / "journal.jsonl").write_bytes(data)
    with pytest.raises(CommitError) as caught:
        go_on(begun)
    assert caught.value.reason == "conflict"
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (begun / "one.txt").read_bytes() == b"one"


def line(**changes: Any) -> bytes:
    return json.dumps({**json.loads(LINE), **changes}).encode() + b"\n"


@pytest.mark.parametrize(
    "lines",
    [
        line(name="../one.txt"),
        line(name=NAME),
        line(name="journal.jsonl"),
        line(name=5),
        line(bytes=True),
        line(bytes=-3),
        line(sha256="x"),
        line(facts=5),
        line(facts={"tensors": []}),
        line(more=1),
        b"[]\n",
        b"\xff\xfe\n",
        LINE[:-9],
        LINE[:-1],
        b'{"a":' * 9999 + b"\n",
    ],
    ids=lambda value: ascii(value[:60]),
)
def test_a_line_that_is_none_counts_as_never_written(begun: Path, lines: bytes) -> None:
    (begun / "one.txt").unlink()
    (begun / "journal.jsonl").write_bytes(HEAD + lines)
    assert go_on(begun) == []


@pytest.mark.parametrize(
    "damage",
    [
        write("one.txt", "One"),
        write("one.txt", "ones"),
        remove("one.txt"),
        replace("one.txt", link("gone")),
        lambda path: [link_out(path / "one.txt")],
    ],
    ids=["changed", "longer", "gone", "a link to nothing", "a link out"],
)
def test_a_file_that_is_not_the_one_noted_is_written_again(begun: Path, damage: Damage) -> None:
    damage(begun)
    assert go_on(begun) == []


def test_a_folder_in_the_place_of_a_file_stops_the_writer(begun: Path) -> None:
    (begun / "two.txt").mkdir()
    with pytest.raises(CommitError, match=r"cannot write .*two\.txt: Is a directory"):
        go_on(begun)
