"""Hashing files, several at a time, with bounded memory. Imports no torch.

Reading and hashing both let go of the interpreter's lock, so threads work side by side.
"""

import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from io import RawIOBase
from pathlib import Path
from threading import Lock
from typing import NamedTuple, TypeVar

from qlora_formats.errors import FormatError

_Result = TypeVar("_Result")

# A chunk that stays in a core's own cache between the read and the hash.
CHUNK_BYTES = 2**20
_MAPPED_BYTES = 8 * 2**20

_SECONDS_BETWEEN_REPORTS = 0.1


class FileHash(NamedTuple):
    """Size of a file and sha256 of its bytes, in hexadecimal."""

    bytes: int
    sha256: str


class Meter:
    """Counts the bytes that several threads read, and ends their work when nobody waits for it any more."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = Lock()
        self._stopped = False

    def add(self, n_bytes: int) -> None:
        """Count what was just read. Once stopped, this raises: call it after every chunk."""
        with self._lock:
            self.bytes += n_bytes
        if self._stopped:
            raise _Stopped

    def stop(self) -> None:
        """Let every thread end at its next `add`."""
        self._stopped = True


class _Stopped(Exception):
    """Whoever asked has gone; met by nobody."""


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(
    jobs: Sequence[Callable[[Meter], _Result]],
    *,
    threads: int = 0,
    progress: Callable[[int], None] = lambda _done: None,
) -> list[_Result]:
    """Run jobs, at most `threads` at a time (0: one per usable core), and give their results in the jobs' order.

    The calling thread waits, and calls `progress` with the bytes counted so far some ten times a second and at the
    end. An interrupt, an exception of `progress` or the first one of a job ends all of them at their next chunk, and
    is raised.
    """
    meter = Meter()
    with ThreadPoolExecutor(max_workers=threads or usable_cores()) as pool:
        futures = [pool.submit(job, meter) for job in jobs]
        waiting = set(futures)
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=_SECONDS_BETWEEN_REPORTS, return_when=FIRST_EXCEPTION)
                progress(meter.bytes)
                for future in ended:
                    future.result()
        except BaseException:
            meter.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def hash_file(path: Path, *, meter: Meter | None = None, mapped: bool = False) -> FileHash:
    """Hash one file in the calling thread; FormatError where it cannot be read.

    A `mapped` file is not copied first, which a seventh of the time goes into. It is for files that are mapped anyway:
    where the disk fails, or another program shortens the file, the process is killed.
    """
    sha256, size = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            for piece in _mapped_pieces(file) if mapped else _read_pieces(file):
                sha256.update(piece)
                size += len(piece)
                if meter is not None:
                    meter.add(len(piece))
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    return FileHash(size, sha256.hexdigest())


def _read_pieces(file: RawIOBase) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := file.readinto(buffer):
        yield buffer[:count]


def _mapped_pieces(file: RawIOBase) -> Iterator[memoryview]:
    size = os.fstat(file.fileno()).st_size
    if not size:
        return
    with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapping:
        mapping.madvise(mmap.MADV_SEQUENTIAL)
        for start in range(0, size, _MAPPED_BYTES):
            with memoryview(mapping)[start : start + _MAPPED_BYTES] as piece:
                yield piece
            # Pages that stayed would count as this process' memory.
            mapping.madvise(mmap.MADV_DONTNEED, start, min(_MAPPED_BYTES, size - start))


def hash_files(
    paths: Iterable[Path],
    *,
    threads: int = 0,
    mapped: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[Path, FileHash]:
    """Hash files side by side, each in one thread, the largest first; the result is in the order of `paths`.

    `progress` is called in the calling thread with the bytes hashed and the bytes there are. It may raise, and a
    Ctrl-C may come: then the threads end at their next chunk. FormatError names a file that cannot be read.
    """
    wanted = list(dict.fromkeys(paths))
    sizes = {path: _size(path) for path in wanted}
    largest_first = sorted(wanted, key=lambda path: -sizes[path])
    total = sum(sizes.values())

    def job(path: Path) -> Callable[[Meter], FileHash]:
        return lambda meter: hash_file(path, meter=meter, mapped=mapped)

    found = in_threads(
        [job(path) for path in largest_first], threads=threads, progress=lambda done: progress(done, total)
    )
    hashes = dict(zip(largest_first, found, strict=True))
    return {path: hashes[path] for path in wanted}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
