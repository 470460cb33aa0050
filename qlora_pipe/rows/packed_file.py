"""Open a data file for reading in order, unpacked on the way where its name ends in .gz or .zst."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from qlora_pipe.errors import ConfigError, DataError

PACKED = (".gz", ".zst")

# Zstandard has no way to ask for so many bytes and no more: of so few it makes 32 MiB at most.
_ZSTD_PIECE = 1 << 10
# Frames that ask for a larger window are refused, as the zstd program does unless told otherwise.
_ZSTD_WINDOW = 1 << 27


def unpacked_name(name: str) -> str:
    """A file's name without .gz or .zst at its end."""
    return name.removesuffix(".gz").removesuffix(".zst")


@contextmanager
def open_rows(path: Path, name: str) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, unpacked; DataError calls it by `name` where its packing is damaged or cut off.

    ConfigError where the library that a .zst needs is missing.
    """
    with path.open("rb") as file:
        if path.name.endswith(".gz"):
            yield io.BufferedReader(_Gzip(file, name), 1 << 18)
        elif path.name.endswith(".zst"):
            yield io.BufferedReader(_Zstandard(file, name), 1 << 18)
        else:
            yield file


class _Unpacked(io.RawIOBase):
    """What comes out of a packed file; its faults are DataErrors."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._fill(memoryview(buffer))
        except EOFError as fault:
            raise self._damaged("it ends in the middle") from fault
        except (gzip.BadGzipFile, zlib.error) as fault:
            raise self._damaged(str(fault)) from fault
        self._given += count
        return count

    def _fill(self, buffer: memoryview) -> int:
        raise NotImplementedError

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"{self._name} cannot be unpacked after {self._given:,} bytes of rows: {reason}; fetch or make it again"
        )


class _Gzip(_Unpacked):
    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(file, name)
        self._gzip = gzip.GzipFile(fileobj=file)

    def _fill(self, buffer: memoryview) -> int:
        return self._gzip.readinto(buffer)


class _Zstandard(_Unpacked):
    """Frame after frame. The library's own reader takes a frame that is cut off for a whole one."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(file, name)
        try:
            import zstandard  # noqa: PLC0415  an extra, and only for these files
        except ImportError as fault:
            raise ConfigError(f"{name} is read by the zstandard library: pip install 'qlora-pipe[data]'") from fault
        self._fault = zstandard.ZstdError
        self._library = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: Any = None
        self._left = memoryview(b"")
        self._packed = b""

    def _fill(self, buffer: memoryview) -> int:
        while not self._left:
            self._packed = self._packed or self._file.read(_ZSTD_PIECE)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._unpack()
        count = min(len(self._left), len(buffer))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._library.decompressobj()
        try:
            self._left = memoryview(self._frame.decompress(self._packed))
        except self._fault as fault:
            raise self._damaged(str(fault)) from fault
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = cast(bytes, self._frame.unused_data), None
