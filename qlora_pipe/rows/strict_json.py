"""Decode one JSON value strictly: UTF-8, no field twice, no NaN, at most 32 levels deep."""

import json
import re
from collections import Counter
from typing import Any, NamedTuple, NoReturn

from qlora_pipe.errors import DataError
from qlora_pipe.rows.row import kind_of, quoted

MAX_DEPTH = 32
UTF8_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_TOO_DEEP = f"more than {MAX_DEPTH} levels of arrays and objects"


class Place(NamedTuple):
    """Where in a file some text begins."""

    file: str
    line: int
    """Counted from 1."""
    characters: int = 0
    """Characters of that line that stand before it."""
    bytes: int = 0
    """Bytes of that line that stand before it."""

    @property
    def origin(self) -> str:
        """File and line: `train.jsonl:37`."""
        return f"{self.file}:{self.line}"


class _NotStrict(Exception):
    """JSON that Python's decoder would take and this module does not."""


def decoded(data: bytes, place: Place) -> str:
    """Decode UTF-8; DataError names the line and the byte that is not."""
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        line = place.line + data.count(b"\n", 0, fault.start)
        column = fault.start - data.rfind(b"\n", 0, fault.start)
        column += place.bytes if line == place.line else 0
        raise DataError(
            f"{place.file}:{line}: not UTF-8: byte {column} of the line is 0x{data[fault.start]:02x}"
        ) from fault


def parse_fields(data: bytes, place: Place) -> dict[str, Any]:
    """Decode bytes that are one JSON object and nothing more but space; DataError says what else they are."""
    text = decoded(data, place)
    value, end = _parse(text, _skip_space(text, 0), place)
    if end != len(text):
        column = place.characters + end + 1
        raise DataError(f"{place.origin}: not valid JSON at column {column}: more text follows the row")
    if not isinstance(value, dict):
        raise DataError(f"{place.origin}: a row must be a JSON object, and this is {kind_of(value)}")
    return value


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def _parse(text: str, start: int, place: Place) -> tuple[object, int]:
    """Decode the JSON value at `start`; give it and the position of the next character that is not space."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        # A value this deep has at least so many brackets; few rows need the walk.
        if text.count("{", start, end) + text.count("[", start, end) > MAX_DEPTH:
            _check_depth(value)
    except json.JSONDecodeError as fault:
        reason = fault.msg.removesuffix(" at")
        column = fault.colno + (place.characters if fault.lineno == 1 else 0)
        line = place.line + fault.lineno - 1
        raise DataError(f"{place.file}:{line}: not valid JSON at column {column}: {reason}") from fault
    except RecursionError as fault:
        raise DataError(f"{place.origin}: {_TOO_DEEP}") from fault
    except _NotStrict as fault:
        raise DataError(f"{place.origin}: {fault}") from fault
    except ValueError as fault:
        # Python refuses to turn thousands of digits into an int.
        raise DataError(f"{place.origin}: a number has too many digits") from fault
    return value, _skip_space(text, end)


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
        raise _NotStrict(f"field {quoted(twice)} stands twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise _NotStrict(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
