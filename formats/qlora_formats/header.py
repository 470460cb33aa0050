"""The header of a safetensors file, checked before anything else touches the file. Imports no torch.

A file is a little-endian u64 header length, a JSON header, and one buffer without holes or overlaps. The checks here
are our own, on the raw bytes and with every count bounded, so that a hostile file costs one sentence and little memory.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from qlora_formats.errors import FormatError
from qlora_formats.strict_json import parse_object

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 512
MAX_RANK = 8

METADATA = "__metadata__"

_FIELDS = {"dtype", "shape", "data_offsets"}

# Bytes of one element, by the name that the header uses.
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

# What MAX_TENSORS entries of MAX_RANK dimensions can need, with room for punctuation inside the metadata's strings.
_MAX_PUNCTUATION = {b"{": 4 * MAX_TENSORS, b"[": 4 * MAX_TENSORS, b",": 13 * MAX_TENSORS}
_MAX_DIMENSION = 2**63 - 1


class Entry(NamedTuple):
    """One tensor: `start` and `end` are absolute offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Stamp(NamedTuple):
    """By what a file is known again: its length, and when it was last modified, in nanoseconds."""

    file_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, fd: int) -> Self:
        """Take the stamp of an open file."""
        found = os.fstat(fd)
        return cls(found.st_size, found.st_mtime_ns)


class Header(NamedTuple):
    """A checked header. `entries` are in the order of their bytes; `stamp` is that of the file it was read from."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    stamp: Stamp


def read_header(path: Path) -> Header:
    """Read and check a file's header; FormatError, one sentence with the file's name, where anything is wrong."""
    try:
        # A pipe would be waited for until somebody writes to it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return parse_header(file, what=str(path))
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error


def parse_header(file: BinaryIO, *, what: str) -> Header:
    """As `read_header`, from a file that is open at its start."""
    stamp = Stamp.of(file.fileno())
    file_bytes = stamp.file_bytes
    if file_bytes < 16:
        raise FormatError(f"{what} is not a safetensors file: it has {file_bytes} bytes, too few for a header")
    length = int.from_bytes(file.read(8), "little")
    if not 8 <= length <= file_bytes - 8:
        raise FormatError(
            f"{what} is cut off or not a safetensors file: it says its header has {length:,} bytes,"
            f" and the file has {file_bytes:,}"
        )
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"{what} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    data = file.read(length)
    if len(data) != length:
        raise FormatError(f"{what} shrank while it was read: is another program writing it?")
    entries, metadata = _parse(data, what)
    return Header(_in_order(entries, 8 + length, file_bytes, what), metadata, stamp)


def _parse(data: bytes, what: str) -> tuple[dict[str, Entry], dict[str, str]]:
    if data[:1] != b"{":
        raise FormatError(f"{what} is not a safetensors file: its header does not start with {{")
    if any(data.count(mark) > most for mark, most in _MAX_PUNCTUATION.items()):
        raise FormatError(f"{what} has a header with more values than {MAX_TENSORS:,} tensors can need")
    header = parse_object(data, what=f"the header of {what}", most_values=sum(_MAX_PUNCTUATION.values()))
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{what}: {METADATA} must map strings to strings")
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{what} has {len(header):,} tensors; at most {MAX_TENSORS:,} are read")
    data_start = 8 + len(data)
    return {name: _entry(name, fields, data_start, what) for name, fields in header.items()}, metadata


def _entry(name: str, fields: Any, data_start: int, what: str) -> Entry:
    # A store of a large model has thousands of these, and is opened in tens of milliseconds: plain loops, and no
    # sentence before it is needed.
    def fault(is_wrong: str) -> FormatError:
        return FormatError(f"{what}: tensor {name!r} {is_wrong}")

    if not name or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
        raise FormatError(f"{what}: {name[:40]!r} is no tensor name (printable, 1 to {MAX_NAME_BYTES} bytes)")
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise fault("must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise fault(f"has the unknown dtype {str(dtype)[:40]!r} (known: {', '.join(ITEM_BYTES)})")
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise fault(f"has a shape that is no list of at most {MAX_RANK} sizes")
    elements = spread = 1
    # Not isinstance: true is an int there.
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MAX_DIMENSION:
            raise fault("has a size in its shape that is no whole number from 0 to 2**63 - 1")
        elements *= size
        # An empty tensor too must have strides that fit.
        spread *= size or 1
    if spread > _MAX_DIMENSION:
        raise fault("has a shape of more than 2**63 elements")
    if not isinstance(offsets, list) or len(offsets) != 2 or type(offsets[0]) is not int or type(offsets[1]) is not int:
        raise fault("has data_offsets that are not two whole numbers")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise fault("has data_offsets that are negative or in the wrong order")
    needed = elements * ITEM_BYTES[dtype]
    if end - begin != needed:
        raise fault(f"has {_number(end - begin)} bytes where {dtype} of that shape needs {_number(needed)}")
    return Entry(dtype, tuple(shape), data_start + begin, data_start + end)


def _in_order(entries: dict[str, Entry], data_start: int, file_bytes: int, what: str) -> dict[str, Entry]:
    # Empty tensors come before the one that starts at the same offset.
    ordered = sorted(entries.items(), key=lambda item: item[1][2:])
    reached = data_start
    for name, (_, _, start, end) in ordered:
        if start != reached:
            fault = "overlaps the one before it" if start < reached else "leaves a hole before it"
            raise FormatError(f"{what}: tensor {name!r} {fault}, at data offset {_number(start - data_start)}")
        reached = end
    if reached != file_bytes:
        fault = "is cut off" if reached > file_bytes else "has bytes that belong to no tensor"
        raise FormatError(f"{what} {fault}: its tensors end at byte {_number(reached)} and the file has {file_bytes:,}")
    return dict(ordered)


def _number(value: int) -> str:
    # Python refuses to print integers of thousands of digits, and nobody wants to read them.
    return f"{value:,}" if value < 2**64 else "more than 2**64"
