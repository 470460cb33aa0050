"""Rows of any table that is read here, by the ending of the file's name."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from qlora_pipe.errors import DataError
from qlora_pipe.rows.folder import data_files
from qlora_pipe.rows.json_rows import read_json, read_lines
from qlora_pipe.rows.packed_file import unpacked_name
from qlora_pipe.rows.parquet import read_parquet
from qlora_pipe.rows.row import BadRow, Row
from qlora_pipe.rows.separated import read_separated

_READERS: Mapping[str, Callable[[Path, str], Iterator[Row | BadRow]]] = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_json,
    ".csv": read_separated,
    ".tsv": read_separated,
    ".parquet": read_parquet,
}

TABLES = tuple(_READERS)
"""Endings of the files that are tables; each may be followed by .gz or .zst."""


def table_rows(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, packed or not, or of a folder of them.

    DataError where a file's name has none of these endings.
    """
    for file, name in data_files(path, TABLES):
        yield from read_table(file, name)


def read_table(path: Path, name: str) -> Iterator[Row | BadRow]:
    """As `table_rows`, of one file that errors call `name`."""
    reader = _READERS.get(Path(unpacked_name(name.lower())).suffix)
    if reader is None:
        raise DataError(f"{name} ends in none of {', '.join(TABLES)} (with .gz or .zst after it, or not)")
    yield from reader(path, name)
