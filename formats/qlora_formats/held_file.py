"""A file that is held open for as long as its tensors are used, and must stay as long as it was. Imports no torch."""

import mmap
import os
import platform
import weakref
from pathlib import Path

from qlora_formats.errors import FormatError
from qlora_formats.header import Stamp

# Private pages of a file are never written here, so no swap space need be set aside for them: without this flag Linux
# refuses to map a file larger than its memory. Python 3.11 has no name for it.
_NO_RESERVE = 0x4000 if platform.system() == "Linux" and platform.machine() in {"x86_64", "aarch64"} else 0

# A system call reads at most 2 GiB; a smaller piece lets a Ctrl-C in between.
_MOST_AT_ONCE = 64 * 2**20


class HeldFile:
    """An open file which was checked to be the one that `stamp` was taken of; closed when nothing refers to it.

    FormatError if it cannot be opened, or has been changed or replaced since. The time of the last change tells, since
    network file systems make up the numbers of their files.
    """

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self._path = path
        self._size = stamp.file_bytes
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FormatError(f"cannot read {path}: {error.strerror}") from error
        weakref.finalize(self, os.close, self._fd)
        self.require_its_size()
        if Stamp.of(self._fd) != stamp:
            raise FormatError(f"{path} was changed or replaced since it was opened: run the command again")

    def require_its_size(self) -> None:
        """FormatError if the file has another length than it had."""
        if os.fstat(self._fd).st_size != self._size:
            raise self._resized()

    def mapped(self, *, shared: bool = False) -> mmap.mmap:
        """The whole file as private memory: what is written to it never reaches the file.

        `shared`: as the system's own copy of the file, which cannot be written to.
        """
        try:
            if shared:
                return mmap.mmap(self._fd, self._size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(self._fd, self._size, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=protection)
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot map {self._path} into memory: {error}; --load read does without") from error

    def read_into(self, buffer: memoryview, *, start: int) -> None:
        """Fill `buffer` from the byte `start` on; FormatError where the file has shrunk or cannot be read."""
        reached = 0
        while reached < len(buffer):
            piece = buffer[reached : reached + _MOST_AT_ONCE]
            try:
                count = os.preadv(self._fd, [piece], start + reached)
            except OSError as error:
                raise FormatError(f"cannot read {self._path}: {error.strerror}") from error
            if count == 0:
                raise self._resized()
            reached += count

    def _resized(self) -> FormatError:
        return FormatError(f"{self._path} has changed its size since it was opened: is another program writing it?")
