"""Reading a safetensors file, mapped or read, and writing one tensor by tensor."""

import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from qlora_formats.errors import FormatError
from qlora_formats.header import METADATA, Header, read_header
from qlora_formats.held_file import HeldFile
from qlora_formats.loading import Load

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Small tensors with less than this between them are read at once, up to that many bytes.
_GAP_BYTES = 4096
_RUN_BYTES = 2**20


class TensorInfo(NamedTuple):
    """One tensor of a file: `start` and `end` are absolute offsets in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorPlan(NamedTuple):
    """One tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class ByteSink(Protocol):
    """What tensors are written to."""

    def write(self, data: bytes | memoryview) -> object: ...


class TensorFile:
    """A safetensors file: its checked header, and its tensors, each a view of a mapping or read when asked for.

    The file is opened at the first use, and must then be as it was when its header was read. From there on it is held:
    one that is replaced goes on being read as it was.
    """

    def __init__(self, path: Path, header: Header, *, load: Load = "mmap") -> None:
        self.path = path
        self.metadata = header.metadata
        self.infos = {
            name: TensorInfo(DTYPES[dtype], shape, start, end)
            for name, (dtype, shape, start, end) in header.entries.items()
        }
        self._stamp = header.stamp
        self._load = load
        self._lock = Lock()
        self._held: HeldFile | None = None
        self._mapping: mmap.mmap | None = None

    @classmethod
    def open(cls, path: Path, *, load: Load = "mmap") -> Self:
        """Check the header of `path`; FormatError where anything is wrong with it. No tensor is read."""
        return cls(path, read_header(path), load=load)

    def tensor(self, name: str) -> Tensor:
        """One tensor, by the way of loading that `open` was told.

        "mmap": a view of the file's own bytes, which keeps the mapping alive; what is written to it stays in memory. A
        tensor whose bytes do not lie on a multiple of its element size is copied. "read": a new tensor each time.
        FormatError if there is no such tensor, or the file has changed since `open`.
        """
        info = self._info(name)
        if info.start == info.end:
            return torch.empty(info.shape, dtype=info.dtype)
        if self._load == "read":
            flat = torch.empty(info.end - info.start, dtype=torch.uint8)
            self._file().read_into(flat.numpy().data, start=info.start)
            return flat.view(info.dtype).view(info.shape)
        mapping = self._mapped()
        if info.start % info.dtype.itemsize:
            flat = torch.frombuffer(mapping, dtype=torch.uint8, count=info.end - info.start, offset=info.start)
            return flat.clone().view(info.dtype).view(info.shape)
        count = (info.end - info.start) // info.dtype.itemsize
        return torch.frombuffer(mapping, dtype=info.dtype, count=count, offset=info.start).view(info.shape)

    def release(self, name: str) -> None:
        """Let the system have back the memory that a tensor's pages take up, once nobody needs its values for a while.

        A view of it stays valid and reads them from the file again; what was written to the view is lost.
        """
        info = self._info(name)
        start = info.start - info.start % mmap.PAGESIZE
        if self._mapping is not None and info.end > start:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, info.end - start)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """The bytes of a few small tensors, without mapping anything; those that lie together are read at once."""
        places = sorted((*self._info(name)[2:], name) for name in names)
        for run in _runs(places):
            start = run[0][0]
            data = bytearray(run[-1][1] - start)
            self._file().read_into(memoryview(data), start=start)
            for begin, end, name in run:
                yield name, bytes(data[begin - start : end - start])

    def read_into(self, buffer: memoryview, *, start: int) -> None:
        """Fill `buffer` with the file's bytes from `start` on, whatever they belong to; from any thread.

        FormatError if the file has changed since `open`, or cannot be read.
        """
        self._file().read_into(buffer, start=start)

    def shared(self) -> mmap.mmap:
        """The whole file as memory that is the system's own copy of it: read-only, and a mapping of its own.

        FormatError as `tensor`, and where the file cannot be mapped.
        """
        return self._file().mapped(shared=True)

    def _info(self, name: str) -> TensorInfo:
        info = self.infos.get(name)
        if info is None:
            raise FormatError(f"{self.path} has no tensor {name!r}")
        return info

    def _file(self) -> HeldFile:
        # Several threads may be the first to ask.
        with self._lock:
            if self._held is None:
                self._held = HeldFile(self.path, self._stamp)
        return self._held

    def _mapped(self) -> mmap.mmap:
        file = self._file()
        # A read beyond the end of a file that shrank would kill the process.
        file.require_its_size()
        with self._lock:
            if self._mapping is None:
                self._mapping = file.mapped()
        return self._mapping


def _runs(places: Sequence[tuple[int, int, str]]) -> Iterator[list[tuple[int, int, str]]]:
    """Split places that are sorted by their start where the gaps, or what would be read at once, get large."""
    run: list[tuple[int, int, str]] = []
    for place in places:
        if run and (place[0] - run[-1][1] > _GAP_BYTES or place[1] - run[0][0] > _RUN_BYTES):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def dtype_name(dtype: torch.dtype) -> str:
    """The header's name for a dtype, such as "BF16"."""
    return _NAMES[dtype]


def write_tensors(
    stream: ByteSink,
    layout: Sequence[TensorPlan],
    tensors: Callable[[str], Tensor | bytes],
    *,
    metadata: Mapping[str, str] | None = None,
    alignment: int = 64,
) -> None:
    """Write a safetensors file: the header, then each tensor in the order of `layout`, one at a time.

    `tensors(name)` is asked when its turn comes and must give the planned dtype and shape, or as many bytes. The data
    starts on a multiple of `alignment`. The result depends on nothing but the arguments.
    """
    stream.write(header_bytes(layout, metadata=metadata, alignment=alignment))
    for plan in layout:
        for piece in tensor_bytes(plan, tensors(plan.name)):
            stream.write(piece)


def header_bytes(layout: Sequence[TensorPlan], *, metadata: Mapping[str, str] | None = None, alignment: int) -> bytes:
    """The length and the JSON of a header, padded with spaces so that the data starts on a multiple of `alignment`."""
    entries: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    reached = 0
    for plan in layout:
        assert plan.name not in entries, plan.name
        offsets = [reached, reached + plan.n_bytes]
        entries[plan.name] = {"dtype": dtype_name(plan.dtype), "shape": list(plan.shape), "data_offsets": offsets}
        reached += plan.n_bytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    padded = text.ljust(-(-(8 + len(text)) // alignment) * alignment - 8)
    return len(padded).to_bytes(8, "little") + padded


def tensor_bytes(plan: TensorPlan, value: Tensor | bytes) -> Iterator[bytes | memoryview]:
    """The bytes of one tensor as they are written, without a copy of a contiguous one in main memory."""
    if isinstance(value, bytes):
        assert len(value) == plan.n_bytes, plan.name
        yield value
        return
    assert (value.dtype, tuple(value.shape)) == plan[1:], (plan, value.dtype, value.shape)
    if value.numel():
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
