"""Sixteen ways to damage a row of JSON, each with the reason that has to be given for it."""

import json
import math
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

from qlora_pipe.rows import MAX_ROW_BYTES
from tests.hostile.fuzzed_sources import Fields, Place, Source


class Damaged(NamedTuple):
    """A row that must not be used."""

    line: bytes
    reason: str
    """A regular expression."""


def encoded(rng: random.Random, row: object) -> bytes:
    """A row as one writer or another would put it on a line."""
    separators = rng.choice([None, (",", ":")])
    return json.dumps(row, ensure_ascii=rng.random() < 0.5, separators=separators).encode()


def _holder(row: Any, place: Place) -> Any:
    for step in place[:-1]:
        row = row[step]
    return row


def _with(row: Fields, place: Place, value: object) -> Fields:
    changed = deepcopy(row)
    _holder(changed, place)[place[-1]] = value
    return changed


def _named(place: Place) -> str:
    """The field as the reason names it, by its last name or its path."""
    return rf'field "[\w.\[\]]*{place[-1]}" '


def _bad_utf_8(rng: random.Random, row: Fields, _: Source) -> Damaged:
    line = json.dumps(row).encode()
    place = rng.randrange(len(line) + 1)
    # No first byte; a first byte alone; too long a form; a surrogate; beyond the last character.
    bad = rng.choice([b"\xff", b"\x80", b"\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"])
    return Damaged(line[:place] + bad + line[place:], rf"not UTF-8: byte {place + 1} of the line is 0x{bad[0]:02x}")


def _lone_surrogate(rng: random.Random, row: Fields, source: Source) -> Damaged:
    code = rng.choice([0xD800, 0xDBFF, 0xDC00, 0xDFFF])
    text = f"{_holder(row, source.text)[source.text[-1]]}{chr(code)}"
    reason = rf"{_named(source.text)}holds a lone surrogate \(U\+{code:04X}\) at character {len(text) - 1}"
    return Damaged(json.dumps(_with(row, source.text, text)).encode(), reason)


def _not_a_number(rng: random.Random, row: Fields, _: Source) -> Damaged:
    return Damaged(encoded(rng, {**row, "score": rng.choice([math.nan, [math.nan]])}), "NaN is not a JSON number")


def _infinite(rng: random.Random, row: Fields, _: Source) -> Damaged:
    value = rng.choice([math.inf, -math.inf])
    return Damaged(encoded(rng, {**row, "score": value}), f"{'-' * (value < 0)}Infinity is not a JSON number")


def _wrong_type(rng: random.Random, row: Fields, source: Source) -> Damaged:
    value, kind = rng.choice(
        [(7, "a number"), (0.5, "a number"), (False, "true or false"), (["a"], "an array"), ({"a": "b"}, "an object")]
    )
    return Damaged(encoded(rng, _with(row, source.text, value)), f"{_named(source.text)}is {kind}, not text")


def _missing_field(rng: random.Random, row: Fields, source: Source) -> Damaged:
    changed = deepcopy(row)
    holder = _holder(changed, source.text)
    holder.pop(source.text[-1])
    return Damaged(encoded(rng, changed), f"{_named(source.text)}is missing")


def _null(rng: random.Random, row: Fields, source: Source) -> Damaged:
    return Damaged(encoded(rng, _with(row, source.text, None)), f"{_named(source.text)}is null, not text")


def _duplicate_key(rng: random.Random, row: Fields, _: Source) -> Damaged:
    name = rng.choice(sorted(row))
    twice = f"{{{json.dumps(name)}: {rng.choice(['null', '0', '[]'])}, ".encode()
    return Damaged(twice + json.dumps(row).encode()[1:], f'field "{name}" stands twice')


def _too_deep(rng: random.Random, row: Fields, _: Source) -> Damaged:
    levels = rng.choice([32, 33, 100, 2000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    nest = opening * levels + b"1" + closing * levels
    return Damaged(
        b'{"nest": ' + nest + b", " + json.dumps(row).encode()[1:], "more than 32 levels of arrays and objects"
    )


def _oversize(rng: random.Random, row: Fields, _: Source) -> Damaged:
    padding = "x" * (MAX_ROW_BYTES - len(json.dumps({**row, "padding": ""})) + rng.choice([1, 2, 4097]))
    return Damaged(json.dumps({**row, "padding": padding}).encode(), "the row is longer than 1 MiB")


def _truncated(rng: random.Random, row: Fields, _: Source) -> Damaged:
    line = json.dumps(row).encode()
    return Damaged(line[: rng.randrange(1, len(line))], r"not valid JSON at column \d+: ")


def _trailing_text(rng: random.Random, row: Fields, _: Source) -> Damaged:
    line = json.dumps(row)
    more = rng.choice(["}", "]", ",", "{}", " x", line, f" {line}", "\x00", "\ufeff", "//"])
    column = len(line) + 1 + more.startswith(" ")
    return Damaged(f"{line}{more}".encode(), f"not valid JSON at column {column}: more text follows the row")


def _blank_text(rng: random.Random, row: Fields, source: Source) -> Damaged:
    blank = rng.choice(["", " ", "\n", "\t\r\n", "\u00a0", "\u2003\u3000", "\u2028"])
    return Damaged(encoded(rng, _with(row, source.text, blank)), f"{_named(source.text)}is empty")


def _control_character(rng: random.Random, row: Fields, _: Source) -> Damaged:
    line = json.dumps(row).encode()
    # Within the first name, whatever the row.
    place = 2
    control = bytes([rng.choice([byte for byte in range(32) if byte not in b"\n"])])
    return Damaged(line[:place] + control + line[place:], "not valid JSON at column 3: Invalid control character")


def _not_an_object(rng: random.Random, row: Fields, _: Source) -> Damaged:
    value, kind = rng.choice(
        [
            ([row], "an array"),
            ([], "an array"),
            ("row", "text"),
            (0, "a number"),
            (True, "true or false"),
            (None, "null"),
        ]
    )
    return Damaged(encoded(rng, value), f"a row must be a JSON object, and this is {kind}")


def _misplaced(rng: random.Random, row: Fields, source: Source) -> Damaged:
    changed, reason = source.rows.misplaced(rng, deepcopy(row))
    return Damaged(encoded(rng, changed), reason)


DAMAGES: dict[str, Callable[[random.Random, Fields, Source], Damaged]] = {
    "bad UTF-8": _bad_utf_8,
    "lone surrogate": _lone_surrogate,
    "NaN": _not_a_number,
    "infinity": _infinite,
    "wrong type": _wrong_type,
    "missing field": _missing_field,
    "null": _null,
    "duplicate key": _duplicate_key,
    "too deep": _too_deep,
    "longer than 1 MiB": _oversize,
    "cut off": _truncated,
    "trailing text": _trailing_text,
    "blank text": _blank_text,
    "control character": _control_character,
    "not an object": _not_an_object,
    "misplaced": _misplaced,
}
