"""A row as datasets see it, and a row that can't be used: every fault names file, line and field."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from qlora_pipe.errors import DataError

MAX_ROW_BYTES = 1 << 20
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
TOO_LONG = "the row is longer than 1 MiB"
_NAMES_SHOWN = 8
_NAME_LENGTH = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a file: named fields, whose values are JSON's."""

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
            raise DataError(f'{self.origin}: field "{name}" is missing (row has {listed(self.fields)})')
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

    def renamed(self, fields: Mapping[str, str]) -> "Row":
        """The row in which the field `own` is what the file calls `fields[own]`; its other fields are as they were."""
        taken = {own: self.fields[theirs] for own, theirs in fields.items() if theirs in self.fields}
        return Row(fields={**self.fields, **taken}, origin=self.origin, raw=self.raw) if taken else self


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that can't be read, after which the file goes on."""

    reason: str
    """One sentence that names file, line and fault."""
    raw: bytes
    """The row's own bytes, the first MiB of a longer one."""


def kind_of(value: object) -> str:
    """Name a JSON value's type with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "text", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return kinds[type(value)]


def quoted(name: str) -> str:
    """A name of a foreign file as it can be shown: short, in quotes, printable."""
    shown = name if len(name) <= _NAME_LENGTH else name[:_NAME_LENGTH] + "..."
    return json.dumps(shown, ensure_ascii=LONE_SURROGATE.search(shown) is not None)


def listed(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    every = list(names)
    shown = [quoted(name) for name in every[:_NAMES_SHOWN]]
    more = len(every) - len(shown)
    return ", ".join(shown + [f"and {more} more"] * (more > 0)) or "no fields"
