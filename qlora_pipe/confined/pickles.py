"""Confined work: read a checkpoint that torch pickled, and answer with the bytes of a safetensors file.

torch reads the pickle with `weights_only=True` and onto the meta device: that gives names, dtypes, shapes, strides and
the place of each storage in the file, and neither allocates nor touches a weight. The places are checked against the
zip archive's own records, and the bytes are then copied from the file, so memory stays small whatever the
file claims.
"""

import codecs
import io
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qlora_formats.header import MAX_NAME_BYTES, MAX_RANK, MAX_TENSORS, METADATA
from qlora_formats.tensorfile import DTYPES, TensorPlan, header_bytes
from qlora_pipe.confined.ending import Refused
from qlora_pipe.confined.worker import Work, Write, ran_out_of_memory

MAX_PICKLE_BYTES = 64 * 2**20
MAX_GROWTH = 4
"""The tensors may have this many times the file's bytes: storages that are shared are written out once per name."""

_PIECE_BYTES = 2**20
# As many storages as tensors, and torch's own few records.
_MAX_RECORDS = MAX_TENSORS + 16
_LOCAL_HEADER = struct.Struct("<26xHH")
_ENCRYPTED = 1
_KNOWN_DTYPES = frozenset(DTYPES.values())
_WRAPPINGS = ("state_dict", "model")
_ASKED_FOR = re.compile(r"GLOBAL (\S+)")


class _Placed(NamedTuple):
    """A tensor and where its storage lies in the file."""

    name: str
    tensor: Tensor
    start: int


def prepare(request: dict[str, Any], file: BinaryIO | None) -> Work:  # noqa: ARG001
    """Map the file and load what torch loads late; the work itself opens nothing."""
    assert file is not None
    rehearse()
    n_bytes = file.seek(0, io.SEEK_END)
    mapped = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) if n_bytes else b""
    return lambda write: convert(file, mapped, write)


def rehearse() -> None:
    """Do once what loads code late: torch's own reading, and the codecs of old archives' names and of bytes."""
    for codec in ("cp437", "latin-1"):
        codecs.lookup(codec)
    stage = io.BytesIO()
    torch.save({"": torch.zeros(1)}, stage)
    stage.seek(0)
    torch.load(stage, map_location="meta", weights_only=True)


def convert(file: BinaryIO, mapped: mmap.mmap | bytes, write: Write) -> None:
    """Write the safetensors file that says what a pickle says; Refused where it is not one of weights alone.

    `mapped` has the bytes of `file`. No file and no memory beyond the pickle itself is needed.
    """
    records = _records(file, mapped)
    placed = [_place(name, tensor, records) for name, tensor in _tensors(_loaded(file)).items()]
    if not placed:
        raise Refused("it holds no tensor")
    total = sum(tensor.numel() * tensor.itemsize for _, tensor, _ in placed)
    if total > MAX_GROWTH * len(mapped):
        raise Refused(f"its tensors have {total:,} bytes, which is more than {MAX_GROWTH} times the file's")
    # Wide elements first: each tensor then starts on a multiple of its element size.
    placed.sort(key=lambda item: -item.tensor.itemsize)
    layout = [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor, _ in placed]
    write(header_bytes(layout, metadata={"format": "pt"}, alignment=64))
    for item in placed:
        if item.tensor.is_contiguous():
            _copy(file, item, write)
        elif item.tensor.numel():
            for piece in _pieces(_view(mapped, item)):
                write(piece)


def _records(file: BinaryIO, mapped: mmap.mmap | bytes) -> dict[int, int]:
    """The sizes of the records that hold storages, by the offsets of their bytes."""
    if mapped[:4] != b"PK\x03\x04":
        raise Refused(_instead_of_zip(mapped))
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as fault:
        raise Refused("its zip archive is cut off or damaged") from fault
    entries = archive.infolist()
    if len(entries) > _MAX_RECORDS:
        raise Refused(f"its zip archive has {len(entries):,} entries; at most {_MAX_RECORDS:,} are read")
    if len({entry.filename for entry in entries}) != len(entries):
        raise Refused("its zip archive has an entry twice")
    root = entries[0].filename.partition("/")[0] + "/" if entries else ""
    records = {}
    for entry in entries:
        name = entry.filename.removeprefix(root)
        if not entry.filename.startswith(root) or not set(name.split("/")).isdisjoint({"", ".", ".."}):
            raise Refused(f"its zip archive has the entry {entry.filename[:80]!r}, which torch does not write")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise Refused(f"its entry {entry.filename[:80]!r} is compressed or encrypted, which torch's never are")
        start = _start(entry, mapped)
        if start + entry.file_size > len(mapped) or entry.file_size != entry.compress_size:
            raise Refused(f"its entry {entry.filename[:80]!r} does not lie within the file")
        if name.startswith("data/"):
            records[start] = entry.file_size
        elif name == "byteorder" and mapped[start : start + entry.file_size] != b"little":
            raise Refused("it was written on a machine of another byte order; save it again on one like this")
        elif name == "data.pkl" and entry.file_size > MAX_PICKLE_BYTES:
            raise Refused(f"its pickle has {entry.file_size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    return records


def _start(entry: zipfile.ZipInfo, mapped: mmap.mmap | bytes) -> int:
    """Where an entry's bytes begin: its local header has a name and an extra field of its own lengths."""
    at = entry.header_offset
    head = mapped[at : at + 30]
    if at < 0 or len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise Refused(f"its entry {entry.filename[:80]!r} does not lie within the file")
    name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head)
    return at + 30 + int(name_bytes) + int(extra_bytes)


def _instead_of_zip(mapped: mmap.mmap | bytes) -> str:
    if not mapped:
        return "it is empty"
    if mapped[:7] == b"version":
        return "it is the pointer of Git LFS and not the file itself; fetch that with `git lfs pull`"
    return (
        "it is no zip archive, so it is no checkpoint of torch, or one from before torch 1.6;"
        " load such a one with torch.load(..., weights_only=True) and save it again"
    )


def _loaded(file: BinaryIO) -> Any:
    file.seek(0)
    try:
        return torch.load(file, map_location="meta", weights_only=True)
    # torch raises whatever a hostile pickle leads it into.
    except Exception as fault:
        if ran_out_of_memory(fault):
            raise
        asked = _ASKED_FOR.search(str(fault)) if isinstance(fault, pickle.UnpicklingError) else None
        if asked is not None:
            raise Refused(f"it asks for {asked[1][:80]}, which no file of weights needs") from fault
        raise Refused(f"it is damaged, or holds more than weights ({type(fault).__name__})") from fault


def _tensors(loaded: Any) -> dict[str, Tensor]:
    """The tensors by name; of a training checkpoint, the part that holds the model."""
    if not isinstance(loaded, dict):
        raise Refused(f"it holds a {type(loaded).__name__} where a dict from names to tensors is needed")
    # The methods are taken from dict itself: a pickle may give an object attributes of these names.
    for wrapping in _WRAPPINGS:
        inner = dict.get(loaded, wrapping)
        if isinstance(inner, dict) and not any(isinstance(value, Tensor) for value in dict.values(loaded)):
            loaded = inner
            break
    if len(loaded) > MAX_TENSORS:
        raise Refused(f"it has {len(loaded):,} tensors; at most {MAX_TENSORS:,} are read")
    for name, value in dict.items(loaded):
        if not isinstance(name, str):
            raise Refused(f"one of its names is a {type(name).__name__} and no text")
        if not name or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES or name == METADATA:
            raise Refused(f"{name[:40]!r} is no tensor name (printable, 1 to {MAX_NAME_BYTES} bytes)")
        if not isinstance(value, Tensor):
            raise Refused(f"its entry {name!r} is a {type(value).__name__} and no tensor")
    return dict(dict.items(loaded))


def _place(name: str, tensor: Tensor, records: Mapping[int, int]) -> _Placed:
    """Find a tensor's bytes; Refused unless they are just what a record of the archive holds."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or vars(tensor):
        raise Refused(f"its tensor {name!r} is of a class or has attributes of its own; plain ones alone are read")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise Refused(f"its tensor {name!r} is sparse or quantized; dense ones alone are read")
    if tensor.dtype not in _KNOWN_DTYPES:
        raise Refused(f"its tensor {name!r} is of {tensor.dtype}, which safetensors does not know")
    if tensor.is_conj() or tensor.is_neg():
        raise Refused(f"its tensor {name!r} is a conjugate or negated view; save what it stands for")
    if tensor.dim() > MAX_RANK:
        raise Refused(f"its tensor {name!r} has {tensor.dim()} dimensions; at most {MAX_RANK} are read")
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    # The sums are Python's, which don't wrap: torch's do, and it enlarges a storage where a tensor seems to need it.
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    last = tensor.storage_offset() + sum(steps)
    inside = tensor.numel() == 0 or (last + 1) * tensor.itemsize <= storage.nbytes()
    if start is None or records.get(start) != storage.nbytes() or not inside:
        raise Refused(f"its tensor {name!r} does not have the bytes that its shape and strides need")
    return _Placed(name, tensor, start)


def _copy(file: BinaryIO, item: _Placed, write: Write) -> None:
    """Write a tensor whose bytes lie in the file as they are wanted; read, they take no room in this process."""
    size = item.tensor.itemsize
    file.seek(item.start + int(item.tensor.storage_offset()) * size)
    left = item.tensor.numel() * size
    while left:
        piece = file.read(min(left, _PIECE_BYTES))
        if not piece:
            raise Refused("it shrank while it was read; is another program writing it?")
        write(piece)
        left -= len(piece)


def _view(mapped: mmap.mmap | bytes, item: _Placed) -> "np.ndarray[Any, np.dtype[Any]]":
    """The tensor's elements in the mapped file, as words of their size; numpy checks the bounds once more."""
    tensor, size = item.tensor, item.tensor.itemsize
    return np.ndarray(
        tuple(tensor.shape),
        dtype=np.dtype(f"u{size}"),
        buffer=memoryview(mapped)[item.start : item.start + tensor.untyped_storage().nbytes()],
        offset=tensor.storage_offset() * size,
        strides=tuple(step * size for step in tensor.stride()),
    )


def _pieces(array: "np.ndarray[Any, np.dtype[Any]]") -> Iterator[bytes]:
    """The elements in row-major order, about a MiB at a time, whatever their strides are."""
    if array.nbytes <= _PIECE_BYTES:
        yield array.tobytes()
        return
    rows = _PIECE_BYTES * len(array) // array.nbytes
    if rows == 0:
        for row in array:
            yield from _pieces(row)
        return
    for first in range(0, len(array), rows):
        yield array[first : first + rows].tobytes()
