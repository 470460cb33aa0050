"""Rows of JSON Lines, and of files that are one JSON array: both are read a row at a time, whatever their size."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qlora_pipe.errors import DataError
from qlora_pipe.rows.array_scan import ArrayScan
from qlora_pipe.rows.folder import data_files
from qlora_pipe.rows.packed_file import open_rows
from qlora_pipe.rows.row import MAX_ROW_BYTES, TOO_LONG, BadRow, Row
from qlora_pipe.rows.strict_json import UTF8_BOM, Place, parse_fields

LINES = (".jsonl", ".ndjson")
EITHER = (".json", *LINES)


def json_rows(path: Path) -> Iterator[Row | BadRow]:
    """Yield the objects of a file that is one JSON array, or else has one object a line."""
    for file, name in data_files(path, EITHER):
        yield from read_json(file, name)


def json_lines(path: Path) -> Iterator[Row | BadRow]:
    """Yield the objects of JSON Lines files, one a line of at most 1 MiB; blank lines are passed over."""
    for file, name in data_files(path, LINES):
        yield from read_lines(file, name)


def json_array(path: Path) -> Iterator[Row | BadRow]:
    """Yield the objects of files that are one JSON array each; a row's origin is the line that it begins on.

    A row whose brackets close is a BadRow whatever is wrong inside of it; where they do not, DataError ends the file.
    """
    for file, name in data_files(path, (".json",)):
        yield from _array(file, name)


def read_json(path: Path, name: str) -> Iterator[Row | BadRow]:
    """As `json_rows`, of one file that errors call `name`."""
    with open_rows(path, name) as stream:
        start = stream.read(4096)
    is_array = start.removeprefix(UTF8_BOM).lstrip().startswith(b"[")
    yield from _array(path, name) if is_array else read_lines(path, name)


def read_lines(path: Path, name: str) -> Iterator[Row | BadRow]:
    """As `json_lines`, of one file that errors call `name`."""
    with open_rows(path, name) as file:
        for number, ended_line, whole in byte_lines(file):
            line = without_end(ended_line)
            if not line.strip():
                continue
            origin = f"{name}:{number}"
            if not whole or len(line) > MAX_ROW_BYTES:
                yield BadRow(reason=f"{origin}: {TOO_LONG}", raw=line[:MAX_ROW_BYTES])
                continue
            try:
                fields = parse_fields(line, Place(name, number))
            except DataError as fault:
                yield BadRow(reason=str(fault), raw=line)
                continue
            yield Row(fields=fields, origin=origin, raw=line)


def byte_lines(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """Yield each line's number, its bytes without the file's mark, and whether they are all: 1 MiB and a little is."""
    number = 0
    # Room for a byte order mark, "\r\n" and one byte more: a longer row is told from one that just fits.
    most = MAX_ROW_BYTES + 6
    while line := file.readline(most):
        number += 1
        whole = line.endswith(b"\n") or len(line) < most
        yield number, line.removeprefix(UTF8_BOM if number == 1 else b""), whole
        while not line.endswith(b"\n") and (line := file.readline(most)):
            pass


def without_end(line: bytes) -> bytes:
    """A line without its line end."""
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _array(path: Path, name: str) -> Iterator[Row | BadRow]:
    with open_rows(path, name) as file:
        for element in ArrayScan(file, name):
            if element.too_long:
                yield BadRow(reason=f"{element.place.origin}: {TOO_LONG}", raw=element.raw)
                continue
            try:
                fields = parse_fields(element.raw, element.place)
            except DataError as fault:
                if not element.closed:
                    raise
                yield BadRow(reason=str(fault), raw=element.raw)
                continue
            yield Row(fields=fields, origin=element.place.origin, raw=element.raw)
