"""JSON read strictly and written in one fixed form.

Read: UTF-8, no duplicate keys, finite numbers, no lone surrogates, bounded size; the outermost value is an object.
Written: keys sorted, no NaN, so that the same values give the same bytes.
"""

import json
from collections.abc import Mapping
from math import isinf
from pathlib import Path
from typing import Any, NoReturn

from qlora_formats.errors import FormatError

MAX_BYTES = 64 * 2**20


def parse_object(data: bytes, *, what: str) -> dict[str, Any]:
    """Parse one JSON object; `what` names its place in the FormatError, such as a path."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not UTF-8 text (byte {error.start})") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite_float)
        if "\\u" in text:
            _refuse_lone_surrogates(value)
    except ValueError as error:
        raise FormatError(f"{what} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise FormatError(f"{what} is not valid JSON: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what} holds a JSON {_kind(value)} where an object is needed")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read one JSON file of at most 64 MiB that holds an object; FormatError names the file."""
    return parse_object(read_bytes(path, limit=MAX_BYTES), what=str(path))


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes; FormatError where that fails."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit:
        raise FormatError(f"{path} is larger than the {limit:,} bytes that such a file may have")
    return data


def canonical(value: Any) -> bytes:
    """The compact form that digests are taken of."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def pretty(value: Any) -> bytes:
    """The indented form of files that people read, as transformers writes config.json."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=2) + "\n").encode()


def normal(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as it comes back from JSON, so that a tuple and the list it is written as are the same."""
    result: dict[str, Any] = json.loads(canonical(dict(value)))
    return result


def is_int(value: Any) -> bool:
    """Whether a parsed JSON value is an integer; JSON's true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _refuse_lone_surrogates(value: Any) -> None:
    try:
        canonical(value)
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair, which is no text") from error


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case _:
            return "list"
