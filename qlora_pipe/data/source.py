"""What `NAME:PATH`, `NAME` or `hub:USER/NAME` stands for: a dataset's files, here or on the Hub, and their rows."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pluggy

from qlora_formats.commit import write_file
from qlora_formats.hashing import hash_files
from qlora_pipe.data.place import cache_folder
from qlora_pipe.data.splits import split_files
from qlora_pipe.dataset import Dataset, Example, HubFiles
from qlora_pipe.errors import DataError, MissingInputError, NetworkError, UsageProblem
from qlora_pipe.hub import DataListing, fetch_data, list_data
from qlora_pipe.plugins import datasets, find_dataset
from qlora_pipe.rows import ROWS_VERSION, TABLES, BadRow, Row
from qlora_pipe.rows.folder import has_ending
from qlora_pipe.rows.library import library_rows
from qlora_pipe.rows.packed_file import unpacked_name
from qlora_pipe.settings import did_you_mean


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """The files that were named, and how their rows are read."""

    dataset: Dataset
    path: Path
    """A file, or a folder."""
    names: tuple[str, ...] = ()
    """The files of the folder that are read, where it is not for the dataset to say."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What the file calls the dataset's fields: {"prompt": "question"}."""
    split: str | None = None
    """The split, where it is a library that finds it in the files."""
    hub: Mapping[str, str] = field(default_factory=dict)
    """`repo` and `revision`, a commit, of what comes from the Hub."""

    def read(self) -> Iterator[tuple[Row, list[Example]] | BadRow]:
        """Yield each row and its examples, or a row that can't be used; DataError where a file can't be read on."""
        for row in self._rows():
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                found = self.dataset.example(row.renamed(self.fields))
                yield row, [found] if isinstance(found, Example) else list(found)
            except DataError as fault:
                yield BadRow(reason=str(fault), raw=row.raw)

    def first_example(self) -> Example | None:
        """Give the first example that can be used, None where there is none: it shows what form the rows are in."""
        found = (example for each in self.read() if not isinstance(each, BadRow) for example in each[1])
        return next(found, None)

    def _rows(self) -> Iterator[Row | BadRow]:
        if not self.names:
            yield from self.dataset.rows(self.path)
        for name in self.names:
            folder = name.rpartition("/")[0]
            for row in self.dataset.rows(self.path / name):
                yield _in_folder(row, folder) if folder else row

    @cached_property
    def contents(self) -> tuple[tuple[str, str], ...]:
        """Name and sha256 of each file. Of a lone file only the ending counts: renamed, it holds the same rows."""
        if self.names:
            names: Sequence[str] = self.names
        elif self.path.is_dir():
            names = sorted(file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())
        else:
            names = ()
        files = {self.path / name: name for name in names} or {self.path: ""}
        found = hash_files(files)
        if len(found) == 1:
            return tuple((Path(unpacked_name(file.name)).suffix, each.sha256) for file, each in found.items())
        return tuple((files[file], each.sha256) for file, each in found.items())

    def fingerprint(self, encoding: str) -> str:
        """Hash all that the samples depend on, without making them: names and bytes of files, fields, and `encoding`.

        Hexadecimal; changes whenever the same command might load other samples.
        """
        parts = (ROWS_VERSION, self.dataset.name, self.split, sorted(self.fields.items()), self.contents, encoding)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def code(self) -> str:
        """Hash what tells whether samples made earlier still are what this program would make: the plugin's code.

        Of a module in a package that is the code beside it as well, which it may import.
        """
        digest = hashlib.sha256(self.path.name.encode())
        for function in (self.dataset.example, self.dataset.rows):
            module = sys.modules.get(getattr(function, "__module__", ""))
            file = Path(getattr(module, "__file__", None) or "")
            beside = sorted(file.parent.glob("*.py")) if getattr(module, "__package__", "") else [file]
            for each in beside:
                digest.update(each.read_bytes() if each.is_file() else b"")
        return digest.hexdigest()


def find_source(
    spec: str, *, manager: pluggy.PluginManager, split: str | None = None, fields: Mapping[str, str] | None = None
) -> DataSource:
    """Read `NAME:PATH`, or `NAME[@REVISION]` for what lies on the Hub, and fetch the latter.

    `fields` are what the file calls the dataset's own: {"prompt": "question"}. UsageProblem for another form, or a
    dataset, split or field that there is not; MissingInputError for a path that is not; and the errors of the Hub.
    """
    name, colon, place = spec.partition(":")
    name, _, revision = name.partition("@") if not colon else (name, "", "")
    known = datasets(manager)
    if not name or (not place if colon else name not in known):
        installed = ", ".join(known) or "none"
        raise UsageProblem(
            f"{spec!r} does not name data: write NAME:PATH, such as alpaca:train.json (installed: {installed})"
        )
    dataset = find_dataset(manager, name)
    fields = fields or {}
    _check_fields(fields, dataset)
    if dataset.hub is not None and (not place or not dataset.hub.repo):
        return _from_hub(
            dataset, dataset.hub, place=place or f"{dataset.hub.repo}@{revision}", split=split, fields=fields
        )
    if not place:
        raise UsageProblem(f"{spec!r} names no file, and the dataset {name} is not on the Hub: write {name}:PATH")
    path = Path(place).expanduser()
    if not (path.is_file() or path.is_dir()):
        raise MissingInputError(f"no file or folder at {path} (asked for by {spec})")
    names: Sequence[str] = ()
    if split is not None:
        if path.is_file():
            raise UsageProblem(
                f"{path} is one file, so it has no split {split!r}: name its folder, or leave --split out"
            )
        found = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        names = split_files(found, dataset.hub or HubFiles(repo="", splits={}), split=split, what=str(path))
    return DataSource(dataset=dataset, path=path, names=tuple(names), fields=fields)


def parse_fields(entries: Sequence[str]) -> dict[str, str]:
    """Read OWN=THEIRS, as `--map` takes them, several with commas between; UsageProblem for anything else."""
    found: dict[str, str] = {}
    for entry in (part for each in entries for part in each.split(",")):
        own, equals, theirs = (part.strip() for part in entry.partition("="))
        if not (own and equals and theirs):
            raise UsageProblem(f"--map takes OWN=THEIRS, such as prompt=question, and was given {entry!r}.")
        if own in found:
            raise UsageProblem(f"--map names the field {own!r} twice.")
        found[own] = theirs
    return found


def _check_fields(fields: Mapping[str, str], dataset: Dataset) -> None:
    if fields and not dataset.fields:
        raise UsageProblem(f"the fields of {dataset.name} have fixed names: leave --map out, or name the data jsonl.")
    for own, theirs in fields.items():
        if own not in dataset.fields:
            known = did_you_mean(own, dict.fromkeys(dataset.fields))
            raise UsageProblem(f"--map {own}={theirs}: the dataset {dataset.name} has no field {own!r}{known}.")


def _from_hub(
    dataset: Dataset, known: HubFiles, *, place: str, split: str | None, fields: Mapping[str, str]
) -> DataSource:
    """Fetch the files of USER/NAME[/FOLDER][@REVISION]."""
    place, _, revision = place.partition("@")
    parts = place.strip("/").split("/")
    repo, folder = "/".join(parts[:2]), "/".join(parts[2:])
    listing = _listing(repo, revision=revision or None)
    safe = [name for name in listing.names if not name.startswith("/") and ".." not in name.split("/")]
    named = [name for name in safe if not folder or name == folder or name.startswith(f"{folder}/")]
    names = [name for name in named if not name.endswith(".py")]
    hub = {"repo": repo, "revision": listing.revision}
    if not known.splits and names and not any(has_ending(name, TABLES) for name in names):
        split = split or "train"
        path = fetch_data(repo, listing, names) / folder
        dataset = dataclasses.replace(dataset, rows=partial(library_rows, split=split))
        return DataSource(dataset=dataset, path=path, fields=fields, split=split, hub=hub)
    chosen = split_files(names, known, split=split, what=f"the dataset {place}")
    path = fetch_data(repo, listing, chosen)
    return DataSource(dataset=dataset, path=path, names=tuple(chosen), fields=fields, hub=hub)


def _listing(repo: str, *, revision: str | None) -> DataListing:
    """The repository's files; where the Hub is out of reach, those that it named the last time.

    The Hub's own cache knows only the files that were fetched, and not which are still to be.
    """
    key = hashlib.sha256(f"{repo}@{revision or ''}".encode()).hexdigest()
    kept = cache_folder() / "listings" / f"{key}.json"
    try:
        listing = list_data(repo, revision=revision)
    except NetworkError:
        if not kept.is_file():
            raise
        found: Any = json.loads(kept.read_bytes())
        return DataListing(found["revision"], tuple(found["names"]))
    write_file(kept, json.dumps(listing._asdict()).encode())
    return listing


def _in_folder(row: Row | BadRow, folder: str) -> Row | BadRow:
    if isinstance(row, BadRow):
        return BadRow(reason=f"{folder}/{row.reason}", raw=row.raw)
    return Row(fields=row.fields, origin=f"{folder}/{row.origin}", raw=row.raw)
