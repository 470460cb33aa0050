"""Twelve ways to damage a file, seeds to damage, and the check that every opening function refuses or is right.

A seed is a folder. What is mutated of it is its safetensors file or one of its JSON files; the folder is otherwise as
it was made, its manifest included, if it has one.
"""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from qlora_formats.adapter import AdapterFolder
from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.errors import FormatError
from qlora_formats.header import ITEM_BYTES
from qlora_formats.manifest import Manifest
from qlora_formats.store import Store, StoredWeight
from qlora_formats.tensorfile import DTYPES

Fate = Literal["refused", "caught by checksums", "accepted"]

_NUMBERS = (0, 1, -1, 2, 255, 4096, 2**31, 2**32, 2**53, 2**63, 2**64, 10**40)
_TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b" ", b"NaN", b"-Infinity", b"null", b"true", b"1e999", b"1e9", b"0.5"),
    *(b"\\u0000", b"\\ud800", b"\x00", b"\xc3", b"\xff", b"\xe2\x80\xae", b'"w":', b'"shape":[]', b"[" * 2000),
)


class Parts(NamedTuple):
    """A file in two: what says what is in it (all of a JSON file), and the bytes of its tensors."""

    text: bytes
    payload: bytes
    is_json: bool

    def joined(self, text: bytes) -> bytes:
        return text if self.is_json else len(text).to_bytes(8, "little") + text + self.payload

    @property
    def whole(self) -> bytes:
        return self.joined(self.text)


def in_parts(path: Path) -> Parts:
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return Parts(data, b"", is_json=True)
    end = 8 + int.from_bytes(data[:8], "little")
    return Parts(data[8:end], data[end:], is_json=False)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _used(parts: Parts) -> int:
    """Where the spaces begin that fill a header up."""
    return len(parts.text.rstrip()) or 1


def _length_flipped(parts: Parts, rng: random.Random) -> bytes:
    return _flipped(parts.whole[:8], rng) + parts.whole[8:]


def _length_replaced(parts: Parts, rng: random.Random) -> bytes:
    n = len(parts.text)
    length = rng.choice(
        [0, 1, 7, 8, n - 1, n + 1, n + len(parts.payload), rng.randrange(n), 2**24 + 1, 2**63, 2**64 - 1]
    )
    return length.to_bytes(8, "little") + parts.whole[8:]


def _bit_flipped(parts: Parts, rng: random.Random) -> bytes:
    return parts.joined(_flipped(parts.text, rng))


def _byte_replaced(parts: Parts, rng: random.Random) -> bytes:
    at = rng.randrange(_used(parts))
    return parts.joined(parts.text[:at] + bytes([rng.randrange(256)]) + parts.text[at + 1 :])


def _number_replaced(parts: Parts, rng: random.Random) -> bytes:
    digits = [at for at, byte in enumerate(parts.text) if 48 <= byte < 58] or [0]
    at = rng.choice(digits)
    end = at + 1
    while rng.random() < 0.7 and parts.text[end : end + 1].isdigit():
        end += 1
    number = str(rng.choice([*_NUMBERS, rng.randrange(1000)])).encode()
    return parts.joined(parts.text[:at] + number + parts.text[end:])


def _span_deleted(parts: Parts, rng: random.Random) -> bytes:
    at = rng.randrange(_used(parts))
    return parts.joined(parts.text[:at] + parts.text[at + rng.randrange(1, 90) :])


def _span_repeated(parts: Parts, rng: random.Random) -> bytes:
    at = rng.randrange(_used(parts))
    end = at + rng.randrange(1, 90)
    return parts.joined(parts.text[:end] + parts.text[at:])


def _token_inserted(parts: Parts, rng: random.Random) -> bytes:
    at = rng.randrange(_used(parts) + 1)
    return parts.joined(parts.text[:at] + rng.choice(_TOKENS) + parts.text[at:])


def _cut_off(parts: Parts, rng: random.Random) -> bytes:
    return parts.whole[: rng.randrange(len(parts.whole))]


def _extended(parts: Parts, rng: random.Random) -> bytes:
    return parts.whole + rng.choice([rng.randbytes(rng.randrange(1, 64)), bytes(4096), b" ", b"\n", b"{}"])


def _values_swapped(parts: Parts, rng: random.Random) -> bytes:
    """Exchange the names, or one field, of two entries that lie side by side in the tree."""
    tree = json.loads(parts.text)
    inner = [value for value in tree.values() if isinstance(value, dict) and len(value) > 1]
    chosen = rng.choice([tree, rng.choice(inner)]) if inner else tree
    one, other = rng.sample(sorted(chosen), 2)
    field = rng.choice([None, "dtype", "shape", "data_offsets"])
    if field and all(isinstance(chosen[name], dict) and field in chosen[name] for name in (one, other)):
        chosen[one][field], chosen[other][field] = chosen[other][field], chosen[one][field]
    else:
        chosen[one], chosen[other] = chosen[other], chosen[one]
    text = json.dumps(tree, separators=(",", ":"), indent=2 if parts.is_json else None).encode()
    return parts.joined(text.ljust(len(parts.text)))


def _payload_flipped(parts: Parts, rng: random.Random) -> bytes:
    head = len(parts.whole) - len(parts.payload)
    return parts.whole[:head] + _flipped(parts.payload, rng)


MUTATIONS: dict[str, Callable[[Parts, random.Random], bytes]] = {
    "bit of the length flipped": _length_flipped,
    "length replaced": _length_replaced,
    "bit of the header flipped": _bit_flipped,
    "byte of the header replaced": _byte_replaced,
    "number replaced": _number_replaced,
    "span deleted": _span_deleted,
    "span repeated": _span_repeated,
    "token inserted": _token_inserted,
    "cut off": _cut_off,
    "extended": _extended,
    "values swapped": _values_swapped,
    "bit of the payload flipped": _payload_flipped,
}
# What these change, a file of JSON alone does not have.
_OF_TENSOR_FILES = ("bit of the length flipped", "length replaced", "bit of the payload flipped")


def mutated(parts_of: dict[str, Parts], mutation: str, rng: random.Random) -> tuple[str, bytes]:
    """One of a folder's files, drawn, and what becomes of it; three of four times it is the one with the tensors."""
    names = sorted(parts_of)
    tensor_files = [name for name in names if not parts_of[name].is_json]
    chosen = tensor_files if mutation in _OF_TENSOR_FILES or rng.random() < 0.75 else names
    name = rng.choice(chosen)
    return name, MUTATIONS[mutation](parts_of[name], rng)


def open_model(folder: Path) -> Manifest | None:
    """Open a checkpoint, and compare each tensor with what its file's header declares."""
    opened = CheckpointFolder.open(folder)
    (path,) = opened.shards
    declared = json.loads(in_parts(path).text)
    assert {*opened.names} == declared.keys() - {"__metadata__"}
    for name in opened.names:
        _check(opened.tensor(name), declared[name])
    return opened.manifest


def open_store(folder: Path) -> Manifest | None:
    """Open a store, and compare each weight's parts with what its quant_state declares."""
    opened = Store.open(folder)
    for name in opened.names:
        weight = opened.weight(name)
        assert tuple(weight.shape) == opened.shape(name)
        if not isinstance(weight, StoredWeight):
            continue
        n_blocks = math.ceil(math.prod(weight.shape) / weight.block_size)
        assert weight.codes.shape == (math.ceil(math.prod(weight.shape) / 2),)
        assert weight.absmax.shape == (n_blocks,)
        assert weight.levels.shape == (16,)
        if weight.nested_absmax is not None:
            assert weight.nested_absmax.shape == (math.ceil(n_blocks / weight.nested_block_size),)
            assert weight.nested_levels is not None
            assert weight.nested_levels.shape == (256,)
    return opened.manifest


def open_adapter(folder: Path) -> Manifest | None:
    """Open an adapter, and compare its pairs with the ranks that the config gives."""
    opened = AdapterFolder.open(folder)
    assert opened.modules
    for module, (a, b) in opened.pairs.items():
        assert a.shape[0] == b.shape[1] == opened.config.rank(module)
        assert math.isfinite(opened.config.scale(module))
    return opened.manifest


def _check(tensor: Tensor, declared: dict[str, object]) -> None:
    name, shape = declared["dtype"], declared["shape"]
    assert isinstance(name, str)
    assert tensor.dtype == DTYPES[name]
    assert tensor.element_size() == ITEM_BYTES[name]
    assert list(tensor.shape) == shape


def fate(folder: Path, open_folder: Callable[[Path], Manifest | None], *, has_manifest: bool) -> Fate:
    """Open a mutant and look at all it holds; whatever is raised but FormatError is a fault of the product.

    A folder that was made with a manifest must still be opened with it.
    """
    try:
        manifest = open_folder(folder)
    except FormatError as refusal:
        if "\n" in str(refusal):
            raise
        return "refused"
    assert (manifest is not None) == has_manifest
    if manifest is not None:
        try:
            manifest.verify(folder)
        except FormatError:
            return "caught by checksums"
    return "accepted"


def same_object(one: bytes, other: bytes) -> bool:
    """Whether two JSON texts say the same: spaces may have changed."""
    return bool(json.loads(one) == json.loads(other))
