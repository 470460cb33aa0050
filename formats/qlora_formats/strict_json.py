"""JSON read strictly and written in one fixed form.

Read: UTF-8, no duplicate keys, finite numbers, no lone surrogates, bounded in bytes and in values; the outermost value
is an object. The bounds keep what a file costs in memory to a few times its largest size, whatever it holds.
Written: keys sorted, no NaN, so that the same values give the same bytes.
"""

import json
import os
from collections.abc import Mapping
from math import isinf
from pathlib import Path
from typing import Any, NoReturn

from qlora_formats.errors import FormatError

# Configs, which people write.
MAX_CONFIG_BYTES = 16 * 2**20
# An index and a manifest, which grow with the number of tensors.
MAX_BYTES = 64 * 2**20
MAX_VALUES = 2**19

# Longer text must be plain ASCII: one wide character makes a text take four bytes for each of its characters.
_MAX_WIDE_BYTES = 16 * 2**20
_MAX_DIGITS = 308


def parse_object(data: bytes, *, what: str, most_values: int = MAX_VALUES) -> dict[str, Any]:
    """Parse one JSON object; `what` names its place in the FormatError, such as a path."""
    if sum(map(data.count, (b"{", b"[", b","))) > most_values:
        raise FormatError(f"{what} has more than the {most_values:,} values that such a file may have")
    if len(data) > _MAX_WIDE_BYTES and (not data.isascii() or b"\\u" in data):
        raise FormatError(f"{what} is larger than {_MAX_WIDE_BYTES:,} bytes, and not all of it is plain ASCII")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not UTF-8 text (byte {error.start})") from error
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            # Called for each number, which a header has thousands of: only where one of them may be too long.
            parse_int=_bounded_int if _may_hold_a_long_number(data) else None,
        )
        if "\\u" in text:
            _refuse_lone_surrogates(value)
    except ValueError as error:
        raise FormatError(f"{what} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise FormatError(f"{what} is not valid JSON: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what} holds a JSON {_kind(value)} where an object is needed")
    return value


def read_object(path: Path, *, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read one JSON file of at most `limit` bytes that holds an object; FormatError names the file."""
    return parse_object(read_bytes(path, limit=limit), what=str(path))


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes; FormatError where that fails."""
    try:
        with path.open("rb") as file:
            # No more is asked for than is there: the buffer is made before it is filled.
            data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
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
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:80]!r} stands twice")
            seen.add(name)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _may_hold_a_long_number(data: bytes) -> bool:
    # A number that is too long fills at least one of these windows.
    window = (_MAX_DIGITS + 1) // 2 - 1
    return any(data[start : start + window].isdigit() for start in range(0, len(data), window))


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"{text[:40]}... is too large a number")
    return int(text)


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
