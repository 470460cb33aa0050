"""The effects a commit has on a disk, one function each, with a refusal of the system as CommitError "disk".

The private functions are the bare system calls; tests replace them to stop the world before and after each.
Opening for writing is not among them: `commit` alone does that.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_formats.errors import CommitError
from qlora_formats.target import free_bytes

_MIB = 2**20


def _write(fd: int, data: memoryview) -> int:
    return os.write(fd, data)


def _truncate(fd: int, n_bytes: int) -> None:
    os.ftruncate(fd, n_bytes)


def _reserve(fd: int, n_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, n_bytes)
    else:
        os.ftruncate(fd, n_bytes)


def _fsync(fd: int) -> None:
    os.fsync(fd)


def _rename(old: Path, new: Path) -> None:
    old.rename(new)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _mkdir(path: Path) -> None:
    path.mkdir(exist_ok=True)


def _rmdir(path: Path) -> None:
    path.rmdir()


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into CommitError "disk" that names `path`, the cause and the free space."""
    try:
        yield
    except OSError as error:
        free = free_bytes(path) / _MIB
        raise CommitError(
            f"cannot write {path}: {error.strerror or error} ({free:,.0f} MiB are free there);"
            " what was finished is kept, rerun the command when the cause is gone",
            reason="disk",
        ) from error


def write_all(fd: int, data: memoryview, path: Path) -> None:
    with reporting(path):
        while data:
            data = data[_write(fd, data) :]


def start_writing(fd: int, start: int, n_bytes: int) -> None:
    """Ask the system to begin to bring bytes to the disk, so that the fsync at the end finds little left to do."""
    if hasattr(os, "posix_fadvise"):
        # Of pages that are not on the disk yet, this drops none: it has them written out.
        os.posix_fadvise(fd, start, n_bytes, os.POSIX_FADV_DONTNEED)


def truncate(fd: int, n_bytes: int, path: Path) -> None:
    with reporting(path):
        _truncate(fd, n_bytes)


def reserve(fd: int, n_bytes: int, path: Path) -> None:
    """Make a new file this long, with room on the disk for all of it where the system can promise that."""
    with reporting(path):
        _reserve(fd, n_bytes)


def fsync(fd: int, path: Path) -> None:
    with reporting(path):
        _fsync(fd)


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power failure."""
    with reporting(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _fsync(fd)
        finally:
            os.close(fd)


def rename(old: Path, new: Path) -> None:
    """Rename within one folder, for good."""
    with reporting(new):
        _rename(old, new)
    fsync_path(new.parent)


def remove(path: Path) -> None:
    """Remove a file; one that is gone already is no error."""
    with reporting(path):
        _unlink(path)


def remove_empty_folder(path: Path) -> None:
    with reporting(path):
        _rmdir(path)
    fsync_path(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where missing."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        with reporting(folder):
            _mkdir(folder)
        fsync_path(folder.parent)
