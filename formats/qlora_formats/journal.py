"""What an unfinished folder says about itself, read only; `commit` writes it.

The journal's first line says what the folder is to become; then comes one line per finished file. A line that a
crash cut off counts as never written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qlora_formats.errors import CommitError, FormatError
from qlora_formats.folder import is_plain_name
from qlora_formats.hashing import hash_files
from qlora_formats.manifest import MANIFEST, FileRecord, Manifest
from qlora_formats.strict_json import MAX_BYTES, canonical, parse_object, read_bytes

JOURNAL = "journal.jsonl"

_WRITING = ".writing"


class Journal(NamedTuple):
    """What an unfinished folder was begun as, and the files that are finished in it."""

    kind: str
    inputs: dict[str, Any]
    files: dict[str, FileRecord]

    def to_bytes(self) -> bytes:
        lines = [file_line(name, record) for name, record in self.files.items()]
        return b"".join([canonical({"kind": self.kind, "inputs": self.inputs}) + b"\n", *lines])


def file_line(name: str, record: FileRecord) -> bytes:
    return canonical({"name": name, **record.as_json()}) + b"\n"


def parse_journal(data: bytes, *, what: str) -> Journal | None:
    """Read a journal's bytes; None when not even its first line is whole. The last line of a name counts.

    Raises FormatError when the first line is whole and not that of a journal.
    """
    first, *rest = data.split(b"\n")
    if not rest:
        return None
    head = parse_object(first, what=f"the first line of {what}")
    kind, inputs = head.get("kind"), head.get("inputs")
    if not isinstance(kind, str) or not isinstance(inputs, dict):
        raise FormatError(f"{what} is not a journal of qlora-pipe: its first line lacks kind and inputs")
    files: dict[str, FileRecord] = {}
    # What follows the last newline is torn.
    for line in rest[:-1]:
        entry = _parse_file_line(line)
        if entry is None:
            break
        files[entry[0]] = entry[1]
    return Journal(kind, inputs, files)


def survey(partial: Path) -> Journal | None:
    """Find out what an unfinished folder holds; None for one in which nothing was finished yet.

    The files named are as the journal says, unread. CommitError "conflict" where the folder is not ours to continue.
    """
    journal, manifest = partial / JOURNAL, partial / MANIFEST
    try:
        begun = parse_journal(read_bytes(journal, limit=MAX_BYTES), what=str(journal)) if journal.is_file() else None
        if begun is None and manifest.is_file():
            # The journal goes just before the folder gets its final name, so here only that last step is missing.
            written = Manifest.read(partial)
            return Journal(written.kind, written.inputs, dict(written.files))
    except FormatError as error:
        raise CommitError(f"cannot continue what lies in {partial}: {error}", reason="conflict") from error
    known = {JOURNAL, *(path.name for path in temporaries(partial))}
    strays = sorted({path.name for path in partial.iterdir()} - known) if begun is None else []
    if strays:
        raise CommitError(
            f"{partial} holds {strays[0]!r} and no journal, so it is not an unfinished folder of qlora-pipe:"
            " move it away and rerun the command",
            reason="conflict",
        )
    return begun


def whole_files(folder: Path, files: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Those of `files` that are there with the recorded size and sha256, in their order."""

    def has_its_size(path: Path, record: FileRecord) -> bool:
        return not path.is_symlink() and path.is_file() and path.stat().st_size == record.bytes

    found = hash_files(folder / name for name, record in files.items() if has_its_size(folder / name, record))
    return {name: record for name, record in files.items() if found.get(folder / name) == record[:2]}


def temporary(path: Path) -> Path:
    """The name under which `path` is written."""
    return path.with_name(f".{path.name}{_WRITING}")


def temporaries(folder: Path) -> list[Path]:
    """The files that a crash left half-written; ours by their name."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(".") and path.name.endswith(_WRITING))


def _parse_file_line(line: bytes) -> tuple[str, FileRecord] | None:
    try:
        entry = parse_object(line, what="a line")
    except FormatError:
        return None
    name = entry.pop("name", None)
    record = FileRecord.of_json(entry)
    if not isinstance(name, str) or not is_plain_name(name) or name in {JOURNAL, MANIFEST} or record is None:
        return None
    return name, record
