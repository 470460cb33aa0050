"""The manifest: what a finished folder says about itself, and how damage to it is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_formats.commit import commit_folder
from qlora_formats.errors import FormatError
from qlora_formats.manifest import MANIFEST, Manifest

INPUTS = {"source": {"repo": "org/model", "revision": None}, "block_size": 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as partial:
        partial.write("a.bin", b"aaaa")
        partial.write("b.bin", b"")
        partial.finish({"tensors": {"w": {"rmse": 0.0921}}})
    return tmp_path / "out"


def test_the_manifest_reads_back_as_it_was_finished(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert (manifest.kind, manifest.inputs, manifest.fields) == ("store", INPUTS, {"tensors": {"w": {"rmse": 0.0921}}})
    assert {name: record.bytes for name, record in manifest.files.items()} == {"a.bin": 4, "b.bin": 0}
    manifest.verify(folder)


def test_the_file_is_sorted_and_the_same_inputs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    text = (folder / MANIFEST).read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))
    with commit_folder(tmp_path / "again", kind="store", inputs=dict(reversed(INPUTS.items()))) as partial:
        partial.write("b.bin", b"")
        partial.write("a.bin", b"aaaa")
        partial.finish({"tensors": {"w": {"rmse": 0.0921}}})
    assert (tmp_path / "again" / MANIFEST).read_text() == text


def test_a_folder_without_a_manifest_is_foreign_to_one_reader_and_an_error_to_the_other(tmp_path: Path) -> None:
    assert Manifest.read_if_present(tmp_path) is None
    assert Manifest.read_if_present(tmp_path / "absent") is None
    with pytest.raises(FormatError, match="holds no qlora_pipe"):
        Manifest.read(tmp_path)


def test_verify_finds_a_flipped_bit_that_the_size_does_not_show(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"aaac")
    manifest = Manifest.read(folder)
    with pytest.raises(FormatError, match=r"a\.bin does not have the sha256"):
        manifest.verify(folder)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (INPUTS, None),
        ({**INPUTS, "block_size": 128}, "block_size was 64 and is now 128"),
        ({**INPUTS, "seed": 1}, "seed was absent and is now 1"),
        (
            {"block_size": 64},
            'source.repo was "org/model" and is now absent, source.revision was null and is now absent',
        ),
        (
            {**INPUTS, **dict.fromkeys("abcde", 1)},
            "a was absent and is now 1, b was absent and is now 1, c was absent and is now 1, and 2 more",
        ),
    ],
    ids=["same", "changed", "new", "gone", "many"],
)
def test_difference_names_the_keys_with_old_and_new_values(
    folder: Path, asked: dict[str, Any], said: str | None
) -> None:
    assert Manifest.read(folder).difference(asked) == said


def edit(folder: Path, **changes: Any) -> None:
    body = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps({**body, **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "adapter"}, "does not have the digest that it records: it was edited or damaged"),
        ({"tensors": {}}, "does not have the digest that it records"),
        ({"digest": None}, "does not have the digest that it records"),
        ({"version": 2}, "has format version 2 and this program reads 1: update qlora-pipe"),
        ({"format": "other"}, "is not a manifest of qlora-pipe"),
    ],
)
def test_an_edited_manifest_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    edit(folder, **changes)
    with pytest.raises(FormatError, match=said):
        Manifest.read(folder)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.bin", None, r"lacks the file a\.bin that its qlora_pipe\.json names"),
        ("a.bin", b"aaaaa", r"a\.bin has 5 bytes where qlora_pipe\.json says 4"),
        (MANIFEST, b"{", r"qlora_pipe\.json is not valid JSON"),
        (MANIFEST, b"[]", r"qlora_pipe\.json holds a JSON list where an object is needed"),
        (MANIFEST, b"\x80", r"qlora_pipe\.json is not UTF-8 text"),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, name: str, data: bytes | None, said: str) -> None:
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    with pytest.raises(FormatError, match=said):
        Manifest.read_if_present(folder)
