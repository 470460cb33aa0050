"""Rows of CSV and TSV files, read strictly: the header says how many cells a row has, and quotes close.

CSV as RFC 4180 has it: a cell that begins with a quote ends with one, holds line ends and separators as they are and a
quote twice; no other cell holds a quote. TSV as IANA registers it: without quotes, a cell is what stands between tabs.
"""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from qlora_pipe.errors import DataError
from qlora_pipe.rows.folder import data_files
from qlora_pipe.rows.json_rows import byte_lines, without_end
from qlora_pipe.rows.packed_file import open_rows, unpacked_name
from qlora_pipe.rows.row import MAX_ROW_BYTES, TOO_LONG, BadRow, Row, quoted
from qlora_pipe.rows.strict_json import Place, decoded

# A line's number, its bytes, and whether they are all of it.
_Line = tuple[int, bytes, bool]

_QUOTED = re.compile(r'"((?:[^"]|"")*+)"')


def csv_rows(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of CSV and TSV files as fields that are texts, named by the file's first line."""
    for file, name in data_files(path, (".csv", ".tsv")):
        yield from read_separated(file, name)


def read_separated(path: Path, name: str) -> Iterator[Row | BadRow]:
    """As `csv_rows`, of one file that errors call `name`."""
    return separated_rows(path, separator="\t" if unpacked_name(name.lower()).endswith(".tsv") else ",", name=name)


def separated_rows(
    path: Path, *, separator: str, columns: Sequence[str] | None = None, name: str = ""
) -> Iterator[Row | BadRow]:
    """Yield the rows of one file; `columns` name the cells where the file has no header, `name` the file in errors.

    A row with another number of cells is a BadRow, and so is one whose quotes are wrong: reading goes on with the line
    after the one that it begins on. DataError where the header names no column or one twice.
    """
    name = name or path.name
    with open_rows(path, name) as file:
        lines = _Lines(file)
        names = list(columns) if columns is not None else None
        while (first := lines.take()) is not None:
            number, raw, whole = first
            if not raw.strip():
                continue
            place = Place(name, number)
            reach: list[_Line] = []
            try:
                if separator != "\t" and whole:
                    reach = lines.reach(raw)
                raw = without_end(b"".join([raw, *(line for _, line, _ in reach)]))
                if not whole or len(raw) > MAX_ROW_BYTES:
                    raise DataError(f"{place.origin}: {TOO_LONG}")
                cells = _cells(decoded(raw, place), separator, place)
                if names is None:
                    names = _header(cells, place)
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{place.origin}: the row has {len(cells)} cells, and there are {len(names)} columns"
                    )
            except DataError as fault:
                if names is None:
                    raise
                if isinstance(fault, _Misquoted):
                    # Its quotes may have taken in rows that are none of it.
                    lines.give_back(reach)
                    raw = without_end(first[1])
                yield BadRow(reason=str(fault), raw=raw[:MAX_ROW_BYTES])
                continue
            yield Row(fields=dict(zip(names, cells, strict=True)), origin=place.origin, raw=raw)


class _Misquoted(DataError):
    """A row whose quotes are wrong, so that nobody can say where it ends."""


class _Lines:
    """A file's lines, some of which may be given back."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = byte_lines(file)
        self._ahead: deque[_Line] = deque()

    def take(self) -> _Line | None:
        return self._ahead.popleft() if self._ahead else next(self._lines, None)

    def give_back(self, lines: Sequence[_Line]) -> None:
        self._ahead.extendleft(reversed(lines))

    def reach(self, row: bytes) -> list[_Line]:
        """Take the lines that the quotes of a row's first line reach over; none where they do not close in 1 MiB."""
        quotes, size = row.count(b'"'), len(row)
        taken: list[_Line] = []
        while quotes % 2 and size <= MAX_ROW_BYTES and (line := self.take()) is not None:
            taken.append(line)
            quotes += line[1].count(b'"')
            size += len(line[1])
        if quotes % 2:
            self.give_back(taken)
            return []
        return taken


def _cells(text: str, separator: str, place: Place) -> list[str]:
    if '"' not in text or separator == "\t":
        return text.split(separator)
    cells: list[str] = []
    position = 0
    while True:
        if text.startswith('"', position):
            found = _QUOTED.match(text, position)
            if found is None:
                raise _Misquoted(f"{place.origin}: the quotes of cell {len(cells) + 1} do not close")
            cells.append(found[1].replace('""', '"'))
            position = found.end()
        else:
            end = text.find(separator, position)
            cells.append(text[position : len(text) if end < 0 else end])
            position += len(cells[-1])
            if '"' in cells[-1]:
                raise _Misquoted(
                    f"{place.origin}: cell {len(cells)} holds a quote and does not begin with one:"
                    " put it in quotes, and each quote in it twice"
                )
        if position == len(text):
            return cells
        if not text.startswith(separator, position):
            raise _Misquoted(f"{place.origin}: text follows the closing quote of cell {len(cells)}")
        position += len(separator)


def _header(cells: list[str], place: Place) -> list[str]:
    for number, cell in enumerate(cells, start=1):
        if not cell.strip():
            raise DataError(f"{place.origin}: column {number} has no name; the first line must name the columns")
        if cells.index(cell) != number - 1:
            raise DataError(f"{place.origin}: two columns are named {quoted(cell)}")
    return cells
