"""What is written to a file on its way to the disk: counted and hashed beside the writing."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_formats import disk
from qlora_formats.manifest import FileRecord
from qlora_formats.strict_json import normal

_CHUNK_BYTES = 4 * 2**20
_AHEAD_OF_FSYNC_BYTES = 64 * 2**20


class FileWriter:
    """A file on its way to disk: counts and hashes what is written to it.

    `facts` may be filled with what the journal and the manifest should remember about this file.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.facts: dict[str, Any] = {}
        self._fd = fd
        self._path = path
        self._sha256 = hashlib.sha256()
        # Its thread starts with the first large piece.
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._bytes = 0
        # So many of them are on their way to the disk.
        self._begun = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`; CommitError "disk" where the system refuses."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            piece = view[start : start + _CHUNK_BYTES]
            self._write_and_hash(piece)
            self._bytes += len(piece)
            if self._bytes - self._begun >= _AHEAD_OF_FSYNC_BYTES:
                disk.start_writing(self._fd, self._begun, self._bytes - self._begun)
                self._begun = self._bytes

    def _write_and_hash(self, piece: memoryview) -> None:
        if len(piece) < _CHUNK_BYTES:
            disk.write_all(self._fd, piece, self._path)
            self._sha256.update(piece)
            return
        # Side by side: hashing takes longer than writing, and each leaves the other a core.
        hashed = self._hashing.submit(self._sha256.update, piece)
        try:
            disk.write_all(self._fd, piece, self._path)
        finally:
            hashed.result()

    def close(self) -> None:
        """Let go of the thread that hashes; the file itself is the caller's."""
        self._hashing.shutdown()

    def record(self) -> FileRecord:
        return FileRecord(self._bytes, self._sha256.hexdigest(), normal(self.facts))
