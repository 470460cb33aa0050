"""How files come to lie on disk: the one module of the product that opens files for writing.

A folder grows in `.NAME.partial/` beside its target, locked while a process works on it. Each file is written under a
temporary name, hashed on the way, fsynced, noted in a journal and renamed. The manifest comes last; then the folder
is renamed to its target, once. Whoever is killed in between leaves a partial folder that the same command continues;
nothing half-written is ever seen under a final name.
"""

import fcntl
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from qlora_formats import disk
from qlora_formats.errors import CommitError, FormatError
from qlora_formats.folder import is_plain_name
from qlora_formats.hashing import hash_file
from qlora_formats.journal import JOURNAL, Journal, file_line, survey, temporaries, temporary, whole_files
from qlora_formats.manifest import KINDS, MANIFEST, FileRecord, Manifest, difference
from qlora_formats.strict_json import normal
from qlora_formats.target import partial_path, refuse_existing
from qlora_formats.writer import FileWriter

_CHUNK_BYTES = 4 * 2**20


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o666)


class PartialFolder:
    """A folder that is being written, as `commit_folder` hands it out. File names are plain: no paths, not hidden."""

    def __init__(self, target: Path, journal: Journal) -> None:
        self.path = partial_path(target)
        self._target = target
        self._journal = journal
        # Written anew, so that nothing is appended to a torn line or kept of a file that was lost.
        _replace(self.path / JOURNAL, journal.to_bytes())
        with disk.reporting(self.path / JOURNAL):
            self._journal_fd = _open(self.path / JOURNAL, os.O_WRONLY | os.O_APPEND)

    @property
    def done(self) -> Mapping[str, FileRecord]:
        """The files that are finished, those of an interrupted run included: their size and sha256 were checked."""
        return MappingProxyType(self._journal.files)

    @contextmanager
    def create(self, name: str) -> Iterator[FileWriter]:
        """Write one file; it is finished, and in `done`, when the block is left without an exception.

        A file of that name that is already done is replaced.
        """
        unfinished = temporary(self.path / name)
        with _new_file(unfinished) as writer:
            yield writer
        record = writer.record()
        # Noted before it gets its name: whatever bears a name here is known to be ours.
        self._note(name, record)
        disk.rename(unfinished, self.path / name)
        self._journal.files[name] = record

    def write(self, name: str, data: bytes) -> None:
        """Write one small file."""
        with self.create(name) as writer:
            writer.write(data)

    def copy(self, source: Path, name: str) -> None:
        """Copy the bytes of `source`; FormatError where it cannot be read."""
        with self.create(name) as writer:
            try:
                with source.open("rb") as file:
                    while chunk := file.read(_CHUNK_BYTES):
                        writer.write(chunk)
            except OSError as error:
                raise FormatError(f"cannot read {source}: {error.strerror}") from error

    def adopt(self, name: str) -> None:
        """Take in a file that a library wrote to `path` itself: fsync it, hash it, note it."""
        disk.fsync_path(self.path / name)
        disk.fsync_path(self.path)
        record = FileRecord(*hash_file(self.path / name))
        self._note(name, record)
        self._journal.files[name] = record

    def discard(self, name: str) -> None:
        """Remove a finished file that was needed only on the way, such as a part of a larger one that is done now."""
        # The journal's line stays: whoever goes on finds no file to it, and counts it as never written.
        disk.remove(self.path / name)
        del self._journal.files[name]

    def abandon(self) -> None:
        """Remove all of it: for what nobody will go on with, such as a cache."""
        for path in temporaries(self.path):
            disk.remove(path)
        if not (self.path / JOURNAL).exists():
            # It proves that the rest is ours.
            _replace(self.path / JOURNAL, self._journal.to_bytes())
        for name in (MANIFEST, *self.done, JOURNAL):
            disk.remove(self.path / name)
        disk.remove_empty_folder(self.path)

    def finish(self, fields: Mapping[str, Any] | None = None, *, inputs: Mapping[str, Any] | None = None) -> Manifest:
        """Write the manifest, with `fields` beside its own keys, and give the folder its final name.

        `inputs` takes the place of what the folder was begun with, where that could be said in full only now. If this
        process is then stopped before the folder has its name, `journal.survey` tells which of the two to go on with.
        CommitError "conflict" if the target has appeared meanwhile, or if the folder holds files nobody noted.
        """
        for path in temporaries(self.path):
            disk.remove(path)
        strays = sorted({path.name for path in self.path.iterdir()} - self.done.keys() - {JOURNAL, MANIFEST})
        if strays:
            raise CommitError(
                f"{self.path / strays[0]} lies in a folder that is being written but was not written by it:"
                " move it away and rerun the command",
                reason="conflict",
            )
        kind, begun_with, files = self._journal
        manifest = Manifest.build(
            kind=kind,
            inputs=begun_with if inputs is None else normal(inputs),
            files=files,
            fields=normal(fields or {}),
        )
        _replace(self.path / MANIFEST, manifest.to_bytes())
        disk.remove(self.path / JOURNAL)
        disk.fsync_path(self.path)
        refuse_existing(self._target)
        disk.rename(self.path, self._target)
        return manifest

    def _note(self, name: str, record: FileRecord) -> None:
        assert is_plain_name(name), name
        assert name not in {JOURNAL, MANIFEST}, name
        disk.write_all(self._journal_fd, memoryview(file_line(name, record)), self.path / JOURNAL)
        disk.fsync(self._journal_fd, self.path / JOURNAL)

    def _close(self) -> None:
        os.close(self._journal_fd)


class AppendFile:
    """A file of lines that only grows, such as metrics.jsonl; `truncate` cuts it back to a checkpoint's state."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for appending; the file and its folder are created if missing."""
        disk.make_folder(path.parent)
        with disk.reporting(path):
            fd = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        disk.fsync_path(path.parent)
        return cls(fd, path)

    @property
    def size(self) -> int:
        """The file's length in bytes."""
        return os.fstat(self._fd).st_size

    def append(self, line: bytes) -> None:
        """Append `line` as it is: it survives a kill at once, and a power failure after `sync`."""
        disk.write_all(self._fd, memoryview(line), self._path)

    def sync(self) -> None:
        """Return when all that was appended is on the disk."""
        disk.fsync(self._fd, self._path)

    def truncate(self, n_bytes: int) -> None:
        """Cut the file back to its first `n_bytes` bytes."""
        disk.truncate(self._fd, n_bytes, self._path)
        disk.fsync(self._fd, self._path)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_file(path: Path, data: bytes) -> None:
    """Write or replace one file in one step: whoever reads it sees the old bytes or the new ones, never a mix."""
    disk.make_folder(path.parent)
    _replace(path, data)


def scratch_memory(path: Path, n_bytes: int) -> mmap.mmap:
    """`n_bytes` zeros to read and write that take room on the disk of `path` and not in memory.

    The file has no name, and is gone with the mapping however this process ends. Its room is reserved first: a mapping
    that finds the disk full has no other way to say so than to kill. Raises CommitError "disk".
    """
    disk.make_folder(path.parent)
    # Whoever is stopped before the name is gone leaves an empty file, known for ours by its name and taken over next.
    name = temporary(path)
    with disk.reporting(path):
        fd = _open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        disk.remove(name)
        disk.reserve(fd, n_bytes, path)
        with disk.reporting(path):
            return mmap.mmap(fd, n_bytes)
    finally:
        os.close(fd)


@contextmanager
def commit_folder(
    target: Path, *, kind: str, inputs: Mapping[str, Any], restart: bool = False
) -> Iterator[PartialFolder]:
    """Write a folder that appears under the name `target` only when `finish` is called on what this yields.

    `kind` and `inputs` (JSON) say what it is made from: a partial folder left by an interrupted run of the same is
    continued, with its finished files in `done`. With `restart` whatever an interrupted run left is removed first.
    Leaving the block without `finish` keeps the partial folder. Raises CommitError: "conflict" if the target exists
    or the partial folder belongs to other inputs, "locked" if another process is writing it, "disk" otherwise.
    """
    assert kind in KINDS, kind
    with _locked(target):
        folder = PartialFolder(target, _begin(partial_path(target), Journal(kind, normal(inputs), {}), restart=restart))
        try:
            yield folder
        finally:
            folder._close()


def _begin(partial: Path, asked: Journal, *, restart: bool) -> Journal:
    begun = survey(partial)
    for path in temporaries(partial):
        disk.remove(path)
    if begun is None:
        return asked
    if restart:
        # The journal proves that the rest is ours, so it stands until the new one takes its place.
        _replace(partial / JOURNAL, begun.to_bytes())
        for name in (MANIFEST, *begun.files):
            disk.remove(partial / name)
        return asked
    unlike = difference({"kind": begun.kind, **begun.inputs}, {"kind": asked.kind, **asked.inputs})
    if unlike:
        raise CommitError(
            f"{partial} was begun with other inputs or settings: {unlike}; rerun the command that began it,"
            " choose another name, or delete that folder",
            reason="conflict",
        )
    asked.files.update(whole_files(partial, begun.files))
    for name in begun.files:
        if name not in asked.files:
            disk.remove(partial / name)
    return asked


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    partial = partial_path(target)
    lock = None
    while lock is None:
        refuse_existing(target)
        if os.path.lexists(partial) and (partial.is_symlink() or not partial.is_dir()):
            raise CommitError(f"{partial} is in the way and is not a folder: move it away", reason="conflict")
        disk.make_folder(partial)
        lock = _try_lock(partial)
    try:
        refuse_existing(target)
        yield
    finally:
        os.close(lock)


def _try_lock(partial: Path) -> int | None:
    # The folder itself is locked: there is no lock file to be left over or to be renamed along with it.
    with disk.reporting(partial):
        try:
            fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), partial.stat()):
                return fd
        except BlockingIOError as error:
            os.close(fd)
            raise CommitError(
                f"{partial} is locked: another process is writing it; wait for that or stop it", reason="locked"
            ) from error
        except FileNotFoundError:
            pass
        # Its owner finished and renamed it between our opening and our locking it.
        os.close(fd)
        return None


@contextmanager
def _new_file(path: Path) -> Iterator[FileWriter]:
    with disk.reporting(path):
        fd = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    writer = FileWriter(fd, path)
    try:
        yield writer
        disk.fsync(fd, path)
    finally:
        writer.close()
        os.close(fd)


def _replace(path: Path, data: bytes) -> None:
    with _new_file(temporary(path)) as writer:
        writer.write(data)
    disk.rename(temporary(path), path)
