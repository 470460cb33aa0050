"""Read JSON rows strictly: every fault is a DataError that names file, line and field.

Dataset plugins read their rows with this. It imports neither torch nor a tokenizer.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from qlora_pipe.errors import DataError

MAX_ROW_BYTES = 1 << 20
MAX_DEPTH = 32
UTF8_BOM = b"\xef\xbb\xbf"
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")
_NAMES_SHOWN = 8
_NAME_LENGTH = 40
_TOO_DEEP = f"more than {MAX_DEPTH} levels of arrays and objects"


class _NotStrict(Exception):
    """JSON that Python's decoder would take and this module does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One JSON object of a file."""

    fields: dict[str, Any]
    origin: str
    """Where it stands: `train.jsonl:37`."""
    raw: bytes = b""
    """The row's own bytes, for the file that rows which can't be used are kept in."""

    def has(self, name: str) -> bool:
        """Say whether the row has a field of this name."""
        return name in self.fields

    def text(self, name: str, *, may_be_empty: bool = False) -> str:
        """Give a field that must be text; DataError where it is missing, of another type, or blank."""
        if name not in self.fields:
            raise DataError(f'{self.origin}: field "{name}" is missing (row has {_listed(self.fields)})')
        return self.checked_text(name, self.fields[name], may_be_empty=may_be_empty)

    def checked_text(self, name: str, value: object, *, may_be_empty: bool = False) -> str:
        """Give `value` back if it is text; the error calls it by `name`, such as `messages[2].content`."""
        if not isinstance(value, str):
            self.refuse(name, f"is {kind_of(value)}, not text")
        if not may_be_empty and not value.strip():
            self.refuse(name, "is empty")
        surrogate = LONE_SURROGATE.search(value)
        if surrogate:
            self.refuse(
                name, f"holds a lone surrogate (U+{ord(surrogate.group()):04X}) at character {surrogate.start()}"
            )
        return value

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raise the DataError that says what is wrong with one field."""
        raise DataError(f'{self.origin}: field "{name}" {reason}')


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that can't be read, after which the file goes on."""

    reason: str
    """One sentence that names file, line and fault."""
    raw: bytes


def kind_of(value: object) -> str:
    """Name a JSON value's type with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "text", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return kinds[type(value)]


def json_rows(path: Path) -> Iterator[Row | BadRow]:
    """Yield the objects of a file that is one JSON array, or else has one object a line."""
    with _open(path) as file:
        start = file.read(4096)
    return json_array(path) if start.removeprefix(UTF8_BOM).lstrip().startswith(b"[") else json_lines(path)


def json_lines(path: Path) -> Iterator[Row | BadRow]:
    """Yield the objects of a JSON Lines file, one a line of at most 1 MiB; blank lines are passed over."""
    with _open(path) as file:
        number = 0
        # Room for a byte order mark, "\r\n" and one byte more: a longer row is told from one that just fits.
        while line := file.readline(MAX_ROW_BYTES + 6):
            number += 1
            row = line.removeprefix(UTF8_BOM if number == 1 else b"").removesuffix(b"\n").removesuffix(b"\r")
            if not row.strip():
                continue
            try:
                yield _line(row, file=path.name, number=number)
            except DataError as fault:
                yield BadRow(reason=str(fault), raw=row)
                while not line.endswith(b"\n") and (line := file.readline(MAX_ROW_BYTES)):
                    pass


def _line(row: bytes, *, file: str, number: int) -> Row:
    origin = f"{file}:{number}"
    _check_size(len(row), origin=origin)
    text = decoded(row, file=file, first_line=number)
    value, end = _parse(text, _skip_space(text, 0), file=file, first_line=number)
    if end != len(text):
        raise DataError(f"{origin}: not valid JSON at column {end + 1}: more text follows the row")
    return replace(_row(value, origin=origin), raw=row)


def json_array(path: Path) -> Iterator[Row | BadRow]:
    """Yield the objects of a file that is one JSON array; a row's origin is the line that it begins on."""
    with _open(path) as file:
        text = decoded(file.read().removeprefix(UTF8_BOM), file=path.name)
    opening = _skip_space(text, 0)
    if not text.startswith("[", opening):
        raise DataError(f"{path.name}:1: not a JSON array: it does not begin with a bracket")
    position = _skip_space(text, opening + 1)
    line, counted = 1, 0
    closed = text.startswith("]", position)
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        origin = f"{path.name}:{line}"
        value, end = _parse(text, position, file=path.name)
        _check_size(len(text[position:end].rstrip().encode(errors="surrogatepass")), origin=origin)
        yield _row(value, origin=origin)
        closed = text.startswith("]", end)
        if not closed and not text.startswith(",", end):
            line += text.count("\n", counted, end)
            raise DataError(f'{path.name}:{line}: not valid JSON: after a row comes neither "," nor "]"')
        position = end if closed else _skip_space(text, end + 1)
    if _skip_space(text, position + 1) != len(text):
        line += text.count("\n", counted, position)
        raise DataError(f"{path.name}:{line}: not valid JSON: more text follows the array")


def decoded(data: bytes, *, file: str, first_line: int = 1) -> str:
    """Decode UTF-8; DataError names the line and the byte that is not."""
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        line = first_line + data.count(b"\n", 0, fault.start)
        column = fault.start - data.rfind(b"\n", 0, fault.start)
        raise DataError(f"{file}:{line}: not UTF-8: byte {column} of the line is 0x{data[fault.start]:02x}") from fault


def _open(path: Path) -> BinaryIO:
    if path.is_dir():
        raise DataError(f"{path} is a folder, and this dataset reads one file; name the file")
    return path.open("rb")


def _check_size(size: int, *, origin: str) -> None:
    if size > MAX_ROW_BYTES:
        raise DataError(f"{origin}: the row is longer than 1 MiB")


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def _parse(text: str, start: int, *, file: str, first_line: int = 1) -> tuple[object, int]:
    """Decode the JSON value at `start`; give it and the position of the next character that is not space."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        # A value this deep has at least so many brackets; few rows need the walk.
        if text.count("{", start, end) + text.count("[", start, end) > MAX_DEPTH:
            _check_depth(value)
    except json.JSONDecodeError as fault:
        reason = fault.msg.removesuffix(" at")
        line = first_line + fault.lineno - 1
        raise DataError(f"{file}:{line}: not valid JSON at column {fault.colno}: {reason}") from fault
    except RecursionError as fault:
        raise DataError(f"{file}:{_line_of(text, start, first_line)}: {_TOO_DEEP}") from fault
    except _NotStrict as fault:
        raise DataError(f"{file}:{_line_of(text, start, first_line)}: {fault}") from fault
    except ValueError as fault:
        # Python refuses to turn thousands of digits into an int.
        raise DataError(f"{file}:{_line_of(text, start, first_line)}: a number has too many digits") from fault
    return value, _skip_space(text, end)


def _line_of(text: str, position: int, first_line: int) -> int:
    return first_line + text.count("\n", 0, position)


def _check_depth(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    if level:
        raise _NotStrict(_TOO_DEEP)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _NotStrict(f"field {_quoted(twice)} stands twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise _NotStrict(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _row(value: object, *, origin: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row must be a JSON object, and this is {kind_of(value)}")
    return Row(fields=value, origin=origin)


def _quoted(name: str) -> str:
    shown = name if len(name) <= _NAME_LENGTH else name[:_NAME_LENGTH] + "..."
    return json.dumps(shown, ensure_ascii=LONE_SURROGATE.search(shown) is not None)


def _listed(fields: dict[str, Any]) -> str:
    shown = [_quoted(name) for name in list(fields)[:_NAMES_SHOWN]]
    more = len(fields) - len(shown)
    return ", ".join(shown + [f"and {more} more"] * (more > 0)) or "no fields"
