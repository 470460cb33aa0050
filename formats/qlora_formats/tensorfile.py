"""Reading a safetensors file through a memory mapping, and writing one tensor by tensor."""

import json
import mmap
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from qlora_formats.errors import FormatError
from qlora_formats.header import METADATA, Header, read_header

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

# Private pages of a file are never written here, so no swap space need be set aside for them: without this flag Linux
# refuses to map a file larger than its memory. Python 3.11 has no name for it.
_NO_RESERVE = 0x4000 if platform.system() == "Linux" and platform.machine() in {"x86_64", "aarch64"} else 0


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
    """A safetensors file: its checked header, and its tensors as views of a mapping made at the first use."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.metadata = header.metadata
        self.infos = {
            name: TensorInfo(DTYPES[dtype], shape, start, end)
            for name, (dtype, shape, start, end) in header.entries.items()
        }
        self._file_bytes = header.file_bytes
        self._mapping: mmap.mmap | None = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Check the header of `path`; FormatError where anything is wrong with it. No tensor is read."""
        return cls(path, read_header(path))

    def tensor(self, name: str) -> Tensor:
        """A view of the file's own bytes, which keeps the mapping alive; what is written to it stays in memory.

        A tensor whose bytes do not lie on a multiple of its element size is copied. FormatError if there is no such
        tensor or the file has changed its size since `open`.
        """
        info = self.infos.get(name)
        if info is None:
            raise FormatError(f"{self.path} has no tensor {name!r}")
        if info.start == info.end:
            return torch.empty(info.shape, dtype=info.dtype)
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
        info = self.infos[name]
        start = info.start - info.start % mmap.PAGESIZE
        if self._mapping is not None and info.end > start:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, info.end - start)

    def _mapped(self) -> mmap.mmap:
        try:
            if self._mapping is None:
                with self.path.open("rb") as file:
                    self._mapping = mmap.mmap(
                        file.fileno(),
                        self._file_bytes,
                        flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                        prot=mmap.PROT_READ | mmap.PROT_WRITE,
                    )
            # A read beyond the end of a file that shrank would kill the process.
            if self._mapping.size() == self._file_bytes:
                return self._mapping
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot map {self.path} into memory: {error}") from error
        raise FormatError(f"{self.path} has changed its size since it was opened: is another program writing it?")


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
