"""Every byte of finished folders against their manifests: file by file, and weight by weight where a store knows them.

The digests of a shard's header and of each weight, together with the rule that what is left over are spaces, say all
that the digest of the whole file says. They are computed side by side, and they tell which weight is damaged.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_formats.errors import FormatError
from qlora_formats.folder import is_plain_name
from qlora_formats.hashing import CHUNK_BYTES, Meter, hash_file, in_threads
from qlora_formats.header import MAX_HEADER_BYTES, Entry, read_header
from qlora_formats.held_file import HeldFile
from qlora_formats.manifest import MANIFEST, FileRecord, Manifest
from qlora_formats.quant_state import KINDS, components_of, state_name
from qlora_formats.strict_json import MAX_BYTES, parse_object, read_bytes

# What a reader may take for a model's weights, or for where they lie.
_WEIGHTS = (".safetensors", ".safetensors.index.json")


class Verified(NamedTuple):
    """What was found in one folder.

    `damage` is a sentence per damaged thing, `unlisted` are the names that the manifest doesn't vouch for, `files` and
    `bytes` count what was checked. `kind` is the manifest's, None where that cannot be read.
    """

    folder: Path
    kind: str | None
    files: int
    bytes: int
    damage: list[str]
    unlisted: list[str]


class _Check(NamedTuple):
    """A piece of work for one thread: bytes to read, and what is found wrong with them."""

    n_bytes: int
    run: Callable[[Meter], list[str]]


class _Plan(NamedTuple):
    found: Verified
    checks: list[_Check]


def verify_folders(
    folders: Sequence[Path],
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Verified]:
    """Read every file of each folder and compare it with the folder's manifest, all of them side by side.

    All that is wrong is reported, not only the first thing. Memory is bounded: a chunk per thread. `progress` is called
    with the bytes read and the bytes there are.
    """
    plans = [_plan(folder) for folder in folders]
    checks = [(index, check) for index, plan in enumerate(plans) for check in plan.checks]
    largest_first = sorted(range(len(checks)), key=lambda number: -checks[number][1].n_bytes)
    total = sum(check.n_bytes for _, check in checks)
    results = in_threads(
        [checks[number][1].run for number in largest_first],
        threads=threads,
        progress=lambda done: progress(done, total),
    )
    for number, damage in sorted(zip(largest_first, results, strict=True)):
        plans[checks[number][0]].found.damage.extend(damage)
    return [plan.found for plan in plans]


def _plan(folder: Path) -> _Plan:
    """Look at names, sizes and headers, and list what is to be read."""
    kind, records, damage = _listed(folder)
    checks: list[_Check] = []
    present = {name: record for name, record in records.items() if (folder / name).is_file()}
    for name, record in records.items():
        path = folder / name
        if name not in present:
            damage.append(f"{folder} lacks the file {name} that its {MANIFEST} names: make or fetch it again")
        elif path.stat().st_size != record.bytes:
            size = path.stat().st_size
            how = "was cut off" if size < record.bytes else "has grown"
            damage.append(f"{path} {how}: it has {size:,} bytes where {MANIFEST} says {record.bytes:,}")
        else:
            faults, of_file = _checks_of(path, record)
            damage += faults
            checks += of_file
    unlisted = sorted({path.name for path in folder.iterdir() if path.name[0] != "."} - {MANIFEST} - records.keys())
    if records:
        damage += [
            f"{folder} holds {name}, which its {MANIFEST} does not name: it was put there later, and may be taken for"
            " the model's own"
            for name in unlisted
            if name.endswith(_WEIGHTS)
        ]
    n_bytes = sum(record.bytes for record in present.values())
    return _Plan(Verified(folder, kind, len(present), n_bytes, damage, unlisted), checks)


def _listed(folder: Path) -> tuple[str | None, Mapping[str, FileRecord], list[str]]:
    """The kind, the files that the manifest lists, and what is wrong with the manifest itself.

    What can be read of a damaged one is still compared: a file that has a recorded sha256 is whole all the same.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None, {}, [f"{folder} holds no {MANIFEST}: it was never finished, or the file was deleted"]
    try:
        data = read_bytes(path, limit=MAX_BYTES)
    except FormatError as error:
        return None, {}, [str(error)]
    try:
        manifest = Manifest.parse(data, what=str(path))
    except FormatError as error:
        return None, _legible_records(data, str(path)), [str(error)]
    edited = manifest.to_bytes() != data
    how = [f"{path} is not laid out as it was written: it was edited or damaged"] if edited else []
    return manifest.kind, manifest.files, how


def _legible_records(data: bytes, what: str) -> dict[str, FileRecord]:
    try:
        entries = parse_object(data, what=what).get("files")
    except FormatError:
        return {}
    found = {name: FileRecord.of_json(value) for name, value in entries.items()} if isinstance(entries, dict) else {}
    return {name: record for name, record in found.items() if record is not None and is_plain_name(name)}


def _checks_of(path: Path, record: FileRecord) -> tuple[list[str], list[_Check]]:
    """What is wrong with a file's header, and what is to be read of the file."""
    digests = _digests(record.facts)
    if digests is None:
        return [], [_whole_file(path, record)]
    written, weights = digests
    damage: list[str] = []
    try:
        if _header_digest(path) != written:
            damage.append(f"{path}: the header does not have the sha256 that {MANIFEST} records: it was changed")
        header = read_header(path)
        file = HeldFile(path, header.stamp)
    except FormatError as error:
        return damage or [str(error)], []
    pieces = _pieces(header.entries, weights)
    if pieces is None:
        # Other tensors than the facts tell of: then it is the header, or else the whole file must do.
        return damage, [] if damage else [_whole_file(path, record)]
    checks = []
    for name, parts in pieces.items():
        n_bytes = sum(end - start for start, end in parts.spans) + parts.state[1] - parts.state[0]
        checks.append(_Check(n_bytes, _weight_check(file, path, name, parts, weights[name])))
    return damage, checks


def _digests(facts: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The digests of a shard's header and of its weights, if its writer left them."""
    header, tensors = facts.get("header"), facts.get("tensors")
    if not isinstance(header, str) or not isinstance(tensors, dict):
        return None
    weights = {name: known.get("sha256") if isinstance(known, dict) else None for name, known in tensors.items()}
    return (header, weights) if all(isinstance(digest, str) for digest in weights.values()) else None


def _header_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    return hashlib.sha256(length + header).hexdigest()


class _Parts(NamedTuple):
    """Where a weight lies: the bytes that its digest takes in, in order, and its JSON, empty for a kept tensor."""

    spans: list[tuple[int, int]]
    state: tuple[int, int]


def _pieces(entries: Mapping[str, Entry], weights: Mapping[str, str]) -> dict[str, _Parts] | None:
    """Where each weight lies; None where the file's tensors are not those of these weights."""
    pieces: dict[str, _Parts] = {}
    used: set[str] = set()
    for name in weights:
        states = [state_name(name, kind) for kind in KINDS if state_name(name, kind) in entries]
        if name not in entries or len(states) > 1:
            return None
        scales = [other for other in components_of(name) if states and other in entries]
        used |= {name, *scales, *states}
        state = _place(entries[states[0]]) if states else (0, 0)
        pieces[name] = _Parts([_place(entries[part]) for part in (name, *scales)], state)
    return pieces if used == entries.keys() else None


def _place(entry: Entry) -> tuple[int, int]:
    return entry.start, entry.end


def _whole_file(path: Path, record: FileRecord) -> _Check:
    def run(meter: Meter) -> list[str]:
        try:
            same = hash_file(path, meter=meter) == record[:2]
        except FormatError as error:
            return [str(error)]
        return [] if same else [f"{path} does not have the sha256 that {MANIFEST} records: its bytes were changed"]

    return _Check(record.bytes, run)


def _weight_check(file: HeldFile, path: Path, name: str, parts: _Parts, digest: str) -> Callable[[Meter], list[str]]:
    def run(meter: Meter) -> list[str]:
        sha256 = hashlib.sha256()
        try:
            for span in parts.spans:
                for chunk in _chunks(file, span, meter):
                    sha256.update(chunk)
            state = b"".join(bytes(chunk) for chunk in _chunks(file, parts.state, meter))
        except FormatError as error:
            return [f"{error}, in the weight {name!r}"]
        # The JSON is one flat object; spaces fill up what is behind it.
        end = state.find(b"}") + 1
        sha256.update(state[:end])
        if sha256.hexdigest() != digest:
            return [f"{path}: the weight {name!r} does not have the sha256 that {MANIFEST} records: it was changed"]
        if state[end:].strip(b" "):
            return [f"{path}: the padding of the weight {name!r} is not all spaces: it was changed"]
        return []

    return run


def _chunks(file: HeldFile, span: tuple[int, int], meter: Meter) -> Iterator[memoryview]:
    start, end = span
    buffer = memoryview(bytearray(min(CHUNK_BYTES, end - start)))
    for place in range(start, end, CHUNK_BYTES):
        piece = buffer[: min(CHUNK_BYTES, end - place)]
        file.read_into(piece, start=place)
        meter.add(len(piece))
        yield piece
