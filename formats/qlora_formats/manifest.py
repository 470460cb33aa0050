"""`qlora_pipe.json`: what a finished folder says about itself.

Written last, so its presence means that the folder is whole. It holds the kind of the folder, the inputs and
settings it was made from, size and sha256 of every file, and a digest of itself. It holds no timestamps, host names
or paths: the same inputs give the same bytes.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from qlora_formats.errors import FormatError
from qlora_formats.folder import has_file, is_plain_name
from qlora_formats.hashing import hash_files
from qlora_formats.strict_json import MAX_BYTES, canonical, is_int, parse_object, pretty, read_bytes

MANIFEST = "qlora_pipe.json"
FORMAT = "qlora_pipe"
VERSION = 1
KINDS = ("store", "checkpoint", "adapter", "training", "samples")

_OWN_KEYS = frozenset({"format", "version", "kind", "inputs", "files", "digest"})
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAMED_DIFFERENCES = 3


class FileRecord(NamedTuple):
    """One file of a finished folder. `facts` is what its writer wants remembered, such as a digest per tensor."""

    bytes: int
    sha256: str
    facts: Mapping[str, Any] = MappingProxyType({})

    def as_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"bytes": self.bytes, "sha256": self.sha256}
        return {**record, "facts": dict(self.facts)} if self.facts else record

    @classmethod
    def of_json(cls, value: Any) -> Self | None:
        """The record in a parsed JSON value; None if it is not one."""
        if not isinstance(value, dict) or not value.keys() <= {"bytes", "sha256", "facts"}:
            return None
        size, sha256, facts = value.get("bytes"), value.get("sha256"), value.get("facts", {})
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            return None
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            return None
        return cls(size, sha256, facts) if _are_facts(facts) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A parsed and checked `qlora_pipe.json`. `fields` holds every key that is not the manifest's own."""

    kind: str
    inputs: dict[str, Any]
    files: dict[str, FileRecord]
    fields: dict[str, Any]
    digest: str

    @classmethod
    def build(
        cls, *, kind: str, inputs: Mapping[str, Any], files: Mapping[str, FileRecord], fields: Mapping[str, Any]
    ) -> Self:
        """Make the manifest of a folder that is about to be finished, digest included."""
        assert kind in KINDS, kind
        assert not _OWN_KEYS & fields.keys(), fields.keys()
        body = _body(kind, inputs, files, fields)
        return cls(kind=kind, inputs=dict(inputs), files=dict(files), fields=dict(fields), digest=_digest(body))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check the manifest of a finished folder: its own digest, each file's presence and size.

        Raises FormatError where it is absent or anything disagrees. `verify` also reads the files.
        """
        manifest = cls.read_if_present(folder)
        if manifest is None:
            raise FormatError(f"{folder} holds no {MANIFEST}, so it is not a folder that qlora-pipe has finished")
        return manifest

    @classmethod
    def read_if_present(cls, folder: Path, *, kinds: Collection[str] = KINDS) -> Self | None:
        """As `read`, but None for a folder without a manifest or no folder at all; `kinds` are those that will do."""
        path = folder / MANIFEST
        if not has_file(folder, MANIFEST):
            return None
        manifest = cls.parse(read_bytes(path, limit=MAX_BYTES), what=str(path))
        if manifest.kind not in kinds:
            raise FormatError(f"{path} says that the folder is of kind {manifest.kind}, not {' or '.join(kinds)}")
        for name, record in manifest.files.items():
            file = folder / name
            if not has_file(folder, name):
                raise FormatError(f"{folder} lacks the file {name} that its {MANIFEST} names: make or fetch it again")
            if file.stat().st_size != record.bytes:
                raise FormatError(
                    f"{file} has {file.stat().st_size:,} bytes where {MANIFEST} says {record.bytes:,}:"
                    " it was changed or cut off; make or fetch the folder again"
                )
        return manifest

    def verify(self, folder: Path) -> None:
        """Read every file and compare its sha256; FormatError names the first that differs."""
        found = hash_files(folder / name for name in self.files)
        for name, record in self.files.items():
            if found[folder / name] != record[:2]:
                raise FormatError(
                    f"{folder / name} does not have the sha256 that {MANIFEST} records:"
                    " its bytes were changed; make or fetch the folder again"
                )

    def difference(self, inputs: Mapping[str, Any]) -> str | None:
        """What differs between the recorded inputs and `inputs`, in words; None when they are the same."""
        return difference(self.inputs, inputs)

    def to_bytes(self) -> bytes:
        body = _body(self.kind, self.inputs, self.files, self.fields)
        return pretty({**body, "digest": self.digest})

    @classmethod
    def parse(cls, data: bytes, *, what: str) -> Self:
        """Check the manifest's own bytes, digest included, without a look at the files; `what` is its path."""
        body = parse_object(data, what=what)
        if body.get("format") != FORMAT:
            raise FormatError(f"{what} is not a manifest of qlora-pipe (its format is {body.get('format')!r})")
        if not is_int(body.get("version")) or body["version"] != VERSION:
            raise FormatError(
                f"{what} has format version {body.get('version')!r} and this program reads {VERSION}: update qlora-pipe"
            )
        digest = body.pop("digest", None)
        if digest != _digest(body):
            raise FormatError(f"{what} does not have the digest that it records: it was edited or damaged")
        kind, inputs, entries = body.get("kind"), body.get("inputs"), body.get("files")
        if kind not in KINDS or not isinstance(inputs, dict) or not isinstance(entries, dict):
            raise FormatError(f"{what} lacks a known kind, the inputs or the files")
        files = {}
        for name, value in entries.items():
            record = FileRecord.of_json(value)
            if record is None or not is_plain_name(name):
                raise FormatError(f"{what}: the record of file {name[:80]!r} is malformed")
            files[name] = record
        fields = {key: value for key, value in body.items() if key not in _OWN_KEYS}
        return cls(kind=str(kind), inputs=inputs, files=files, fields=fields, digest=str(digest))


def difference(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """Name the first keys that differ, with the old and the new value; None when nothing does."""
    old, new = dict(_leaves(recorded)), dict(_leaves(asked))
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if not keys:
        return None
    named = [f"{key} was {_shown(old, key)} and is now {_shown(new, key)}" for key in keys[:_NAMED_DIFFERENCES]]
    more = len(keys) - len(named)
    return ", ".join(named) + (f", and {more} more" if more else "")


def _body(
    kind: str, inputs: Mapping[str, Any], files: Mapping[str, FileRecord], fields: Mapping[str, Any]
) -> dict[str, Any]:
    records = {name: record.as_json() for name, record in files.items()}
    return {**fields, "format": FORMAT, "version": VERSION, "kind": kind, "inputs": dict(inputs), "files": records}


def _are_facts(value: Any) -> bool:
    """Whether what stands about each tensor, if anything does, is what readers of it count on."""
    tensors = value.get("tensors", {}) if isinstance(value, dict) else None
    return isinstance(tensors, dict) and all(
        isinstance(known, dict)
        and isinstance(known.get("sha256", ""), str)
        and isinstance(error := known.get("relative_error", 0.0), int | float)
        and not isinstance(error, bool)
        and error >= 0
        for known in tensors.values()
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(body)).hexdigest()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    # Compared as JSON text, so that a tuple equals the list it was written as.
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", canonical(value).decode()


def _shown(leaves: Mapping[str, str], key: str) -> str:
    text = leaves.get(key, "absent")
    return text if len(text) <= 80 else f"{text[:77]}..."
