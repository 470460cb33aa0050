"""Malformed safetensors files: each gives one sentence that names it, and costs little memory."""

import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from qlora_formats.errors import FormatError
from qlora_formats.tensorfile import TensorFile

GOOD = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def one(**changes: Any) -> dict[str, Any]:
    return {"w": {**GOOD["w"], **changes}}


def packed(header: bytes | dict[str, Any], n_data: int = 24, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(n_data)


def raw(text: str) -> bytes:
    return packed(text.encode())


TWO = '{"w":{"dtype":"F32","shape":[3],"data_offsets":[%s]},"v":{"dtype":"F32","shape":[3],"data_offsets":[%s]}}'
ENTRY = '{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}'

CASES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is not a safetensors file: it has 0 bytes"),
    "seven bytes": (b"\x01" * 7, "it has 7 bytes, too few for a header"),
    "a text file": (b"version https://git-lfs.github.com/spec/v1\n", "is cut off or not a safetensors file"),
    "header beyond the end": (packed(GOOD, length=4096), "says its header has 4,096 bytes, and the file has"),
    "header of 2**64 - 1 bytes": (packed(GOOD, length=2**64 - 1), "says its header has 18,446,744,073,709,551,615"),
    "header of no bytes": (packed(GOOD, length=0), "says its header has 0 bytes"),
    "header above the cap": (
        packed(b" " * (16 * 2**20 + 1)),
        r"has a header of 16,777,217 bytes; at most 16,777,216 are read",
    ),
    "header cut in half": (packed(GOOD, length=40), "is not valid JSON"),
    "not an object": (raw("[]" + " " * 10), "its header does not start with {"),
    "space before the object": (raw("  " + json.dumps(GOOD)), "its header does not start with {"),
    "two objects": (raw(json.dumps(GOOD) + "{}"), "is not valid JSON: Extra data"),
    "not UTF-8": (packed(b'{"\xff\xfe":1}'), "is not UTF-8 text (byte 2)"),
    "lone surrogate": (raw('{"\\ud800":' + ENTRY + "}"), "holds half of a surrogate pair"),
    "tensor twice": (raw('{"w":' + ENTRY + ',"w":' + ENTRY + "}"), "the key 'w' stands twice"),
    "tensor twice, once by an escape": (raw('{"w":' + ENTRY + ',"\\u0077":' + ENTRY + "}"), "the key 'w' stands twice"),
    "key of an entry twice": (raw('{"w":{"dtype":"F32","dtype":"F32"}}'), "the key 'dtype' stands twice"),
    "deep nesting": (raw('{"w":' + '{"a":' * 30_000 + "1" + "}" * 30_000 + "}"), "nested too deeply"),
    "millions of lists": (raw('{"w":[' + "[]," * 2_000_000 + "[]]}"), "more values than 65,536 tensors can need"),
    "too many tensors": (
        packed({f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(65_537)}, 0),
        "has 65,537 tensors; at most 65,536 are read",
    ),
    "NaN": (raw('{"w":{"dtype":"F32","shape":[NaN,3],"data_offsets":[0,24]}}'), "NaN is not a JSON number"),
    "Infinity": (raw('{"w":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,24]}}'), "-Infinity is not a JSON"),
    "float beyond float64": (raw('{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,24]}}'), "1e999 is too large"),
    "integer of 5,000 digits": (raw('{"w":' + "9" * 5000 + "}"), f"{'9' * 40}... is too large a number"),
    "integer of 400 digits": (packed(one(data_offsets=[0, 10**399])), f"1{'0' * 39}... is too large a number"),
    "the last of many keys twice": (
        raw('{"__metadata__":{' + "".join(f'"{n}":"",' for n in range(200_000)) + '"199999":""}}'),
        "the key '199999' stands twice",
    ),
    "a million values": (raw('{"w":[' + "1," * 1_000_000 + "1]}"), "more values than 65,536 tensors can need"),
    "a million lines of metadata": (
        raw('{"__metadata__":{' + ",".join(f'"{n}":""' for n in range(1_000_000)) + "}}"),
        "more values than 65,536 tensors can need",
    ),
    "metadata twice": (raw('{"__metadata__":{},"__metadata__":{}}'), "the key '__metadata__' stands twice"),
    "metadata of a list": (packed({**GOOD, "__metadata__": {"a": ["b"]}}), "__metadata__ must map strings to strings"),
    "metadata null": (packed({**GOOD, "__metadata__": None}), "__metadata__ must map strings to strings"),
    "byte order mark": (packed(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()), "its header does not start with {"),
    "of UTF-16": (packed(json.dumps(GOOD).encode("utf-16-le")), "is not valid JSON"),
    "NUL behind the header": (packed(json.dumps(GOOD).encode() + bytes(8)), "is not valid JSON: Extra data"),
    "metadata of numbers": (packed({**GOOD, "__metadata__": {"n": 1}}), "__metadata__ must map strings to strings"),
    "metadata a list": (packed({**GOOD, "__metadata__": []}), "__metadata__ must map strings to strings"),
    "entry a list": (packed({"w": [1, 2]}), "tensor 'w' must have dtype, shape and data_offsets"),
    "entry without a shape": (packed({"w": {"dtype": "F32", "data_offsets": [0, 24]}}), "tensor 'w' must have"),
    "entry with more": (packed(one(strides=[3, 1])), "tensor 'w' must have dtype, shape and data_offsets, and nothing"),
    "empty name": (packed({"": GOOD["w"]}), "'' is no tensor name"),
    "name with a newline": (packed({"a\nb": GOOD["w"]}), r"'a\nb' is no tensor name"),
    "name that turns text around": (packed({"a\u202eb": GOOD["w"]}), "is no tensor name"),
    "name of a NUL": (packed({"a\0b": GOOD["w"]}), r"'a\x00b' is no tensor name"),
    "name of 171 characters, 513 bytes": (
        packed({"\u20ac" * 171: GOOD["w"]}),
        "is no tensor name (printable, 1 to 512",
    ),
    "name of 513 bytes": (packed({"n" * 513: GOOD["w"]}), "is no tensor name (printable, 1 to 512 bytes)"),
    "dtype in small letters": (packed(one(dtype="f32")), "tensor 'w' has the unknown dtype 'f32'"),
    "dtype null": (packed(one(dtype=None)), "tensor 'w' has the unknown dtype 'None'"),
    "dtype of half bytes": (packed(one(dtype="F4")), "tensor 'w' has the unknown dtype 'F4'"),
    "unknown dtype": (packed(one(dtype="F31")), "tensor 'w' has the unknown dtype 'F31'"),
    "dtype a number": (packed(one(dtype=32)), "tensor 'w' has the unknown dtype '32'"),
    "rank 9": (packed(one(shape=[1] * 7 + [2, 3])), "a shape that is no list of at most 8 sizes"),
    "shape a number": (packed(one(shape=6)), "a shape that is no list of at most 8 sizes"),
    "negative size": (packed(one(shape=[-2, -3])), "a size in its shape that is no whole number from 0"),
    "fractional size": (packed(one(shape=[2.0, 3])), "a size in its shape that is no whole number from 0"),
    "boolean size": (packed(one(shape=[True, 6])), "a size in its shape that is no whole number from 0"),
    "size as text": (packed(one(shape=["2", 3])), "a size in its shape that is no whole number from 0"),
    "size null": (packed(one(shape=[None, 6])), "a size in its shape that is no whole number from 0"),
    "shape null": (packed(one(shape=None)), "a shape that is no list of at most 8 sizes"),
    "shape of lists": (packed(one(shape=[[2, 3]])), "a size in its shape that is no whole number from 0"),
    "size of 2**63": (packed(one(shape=[2**63, 0])), "a size in its shape that is no whole number from 0"),
    "product that wraps to 24": (packed(one(shape=[2**62 + 6, 4])), "a shape of more than 2**63 elements"),
    "empty but enormous": (
        packed(one(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), 0),
        "more than 2**63 elements",
    ),
    "offsets the wrong way": (
        packed(one(data_offsets=[24, 0])),
        "data_offsets that are negative or in the wrong",
    ),
    "negative offset": (packed(one(data_offsets=[-24, 0])), "data_offsets that are negative or in the wrong"),
    "three offsets": (packed(one(data_offsets=[0, 24, 48])), "data_offsets that are not two whole numbers"),
    "fractional offsets": (packed(one(data_offsets=[0.0, 24.0])), "data_offsets that are not two whole numbers"),
    "boolean offsets": (packed(one(data_offsets=[False, 24])), "data_offsets that are not two whole numbers"),
    "offsets as text": (packed(one(data_offsets=["0", "24"])), "data_offsets that are not two whole numbers"),
    "offsets null": (packed(one(data_offsets=None)), "data_offsets that are not two whole numbers"),
    "offsets that wrap to 24": (packed(one(data_offsets=[0, 2**64 + 24])), "has more than 2**64 bytes where F32 of"),
    "empty tensor beyond the end": (
        packed({**GOOD, "e": one(shape=[0], data_offsets=[99, 99])["w"]}),
        "tensor 'e' leaves a hole before it, at data offset 99",
    ),
    "huge offsets": (
        packed(one(data_offsets=[0, 10**30])),
        "has more than 2**64 bytes where F32 of",
    ),
    "offsets too short": (packed(one(data_offsets=[0, 20]), 20), "has 20 bytes where F32 of that shape needs 24"),
    "hole at the start": (
        packed(one(data_offsets=[8, 32]), 32),
        "tensor 'w' leaves a hole before it, at data",
    ),
    "hole between": (raw(TWO % ("0,12", "16,28")), "tensor 'v' leaves a hole before it, at data offset 16"),
    "overlap": (raw(TWO % ("0,12", "8,20")), "tensor 'v' overlaps the one before it, at data offset 8"),
    "the same bytes twice": (raw(TWO % ("0,12", "0,12")), "tensor 'v' overlaps the one before it, at data offset 0"),
    "data cut off": (packed(GOOD, 23), "is cut off: its tensors end at byte"),
    "data too long": (packed(GOOD, 25), "has bytes that belong to no tensor"),
    "no tensors but data": (raw("{}" + " " * 8), "has bytes that belong to no tensor"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_file_gives_one_sentence_that_names_it(tmp_path: Path, case: str) -> None:
    data, sentence = CASES[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=re.escape(sentence)) as caught:
            TensorFile.open(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "hostile.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))
    assert peak_bytes < 256 * 2**20


def test_what_is_no_file_is_a_sentence_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(FormatError, match="is not a safetensors file: it has 0 bytes, too few for a header"):
            TensorFile.open(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FormatError, match=r"cannot read .*: Too many levels of symbolic links"):
        TensorFile.open(tmp_path / "loop")
    with pytest.raises(FormatError, match=r"cannot read .*: Is a directory"):
        TensorFile.open(tmp_path)
    with pytest.raises(FormatError, match=r"cannot read .*: No such file"):
        TensorFile.open(tmp_path / "absent")


def test_the_largest_and_the_smallest_that_is_allowed_opens(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for header, n_data in [
        ({}, 0),
        ({"n" * 512: one()["w"]}, 24),
        (one(shape=[1] * 6 + [2, 3]), 24),
        ({"__metadata__": {"x" * 10_000: "y" * 1_000_000}, **GOOD}, 24),
        ({f"t{n}": {"dtype": "U8", "shape": [1] * 8, "data_offsets": [n, n + 1]} for n in range(65_536)}, 65_536),
        (one(shape=[0], data_offsets=[0, 0]), 0),
        ({"z": one(shape=[0], data_offsets=[0, 0])["w"], **GOOD, "y": one(shape=[0], data_offsets=[24, 24])["w"]}, 24),
    ]:
        path.write_bytes(packed(json.dumps(header).encode().ljust(8), n_data))
        file = TensorFile.open(path)
        assert len(file.infos) == len(header.keys() - {"__metadata__"})
        assert all(not file.tensor(name).any() for name in list(file.infos)[-3:])
