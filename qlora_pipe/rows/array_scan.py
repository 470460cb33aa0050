"""Cut a file that is one JSON array into its elements, with a few MiB in memory whatever the file's size.

Where an element ends follows from its brackets and quotes alone, so that the file goes on after one that is wrong.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from qlora_pipe.errors import DataError
from qlora_pipe.rows.row import MAX_ROW_BYTES
from qlora_pipe.rows.strict_json import UTF8_BOM, Place

_READ_BYTES = 4 << 20
# So much is in sight from where an element begins: any that is short enough lies in it whole.
_SIGHT_BYTES = MAX_ROW_BYTES + 1024

_SPACE = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb"[^,\]}\s]*")
# A whole string, or a bracket, or a quote whose string does not end in sight.
_PART = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}"]', re.DOTALL)
_MARK = re.compile(rb'\\.|[\[\]{}"]', re.DOTALL)
_OPENING = (b"[", b"{")
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


class Element(NamedTuple):
    """The bytes of one element."""

    raw: bytes
    place: Place
    """Where it begins."""
    closed: bool
    """Whether its end was found before the file's."""
    too_long: bool
    """Whether it is longer than a row may be; `raw` is then no more than its first MiB."""


class ArrayScan:
    """Yields the elements of an array; DataError where what stands between them is not an array's."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._data = b""
        self._at = 0
        self._ended = False
        self._place = Place(name, 1)

    def __iter__(self) -> Iterator[Element]:
        self._look()
        self._data = self._data.removeprefix(UTF8_BOM)
        if self._next() != b"[":
            raise DataError(f"{self._place.file}:1: not a JSON array: it does not begin with a bracket")
        self._advance(self._at + 1)
        more = self._next() != b"]"
        while more:
            yield self._element()
            after = self._next()
            if after not in (b",", b"]"):
                raise DataError(f'{self._place.origin}: not valid JSON: after a row comes neither "," nor "]"')
            more = after == b","
            if more:
                self._advance(self._at + 1)
                self._next()
        last = self._place
        self._advance(self._at + 1)
        if self._next():
            raise DataError(f"{last.origin}: not valid JSON: more text follows the array")

    def _next(self) -> bytes:
        """Pass over space; give the byte that follows, none at the end of the file."""
        while True:
            self._look()
            found = _SPACE.match(self._data, self._at)
            assert found is not None
            self._advance(found.end())
            if self._at < len(self._data) or self._ended:
                return self._data[self._at : self._at + 1]

    def _look(self) -> None:
        """Read on where less is in sight than a row may be long."""
        while len(self._data) - self._at < _SIGHT_BYTES and not self._ended:
            read = self._file.read(_READ_BYTES)
            self._ended = len(read) < _READ_BYTES
            self._data, self._at = self._data[self._at :] + read, 0

    def _advance(self, end: int) -> None:
        """Take everything before `end` for read, and keep count of lines and columns."""
        passed = self._data[self._at : end]
        _, line, characters, n_bytes = self._place
        lines = passed.count(b"\n")
        if lines:
            characters = n_bytes = 0
            tail = passed[passed.rfind(b"\n") + 1 :]
        else:
            tail = passed
        self._place = Place(
            self._place.file,
            line + lines,
            characters + len(tail.translate(None, _CONTINUATION_BYTES)),
            n_bytes + len(tail),
        )
        self._at = end

    def _element(self) -> Element:
        self._look()
        start, place = self._at, self._place
        end = self._end()
        if end is None and not self._ended:
            raw = self._data[start : start + MAX_ROW_BYTES]
            return Element(raw, place, closed=self._skip(), too_long=True)
        # What is not closed is all that there is.
        raw = self._data[start : len(self._data) if end is None else end]
        self._advance(start + len(raw))
        too_long = len(raw) > MAX_ROW_BYTES
        return Element(raw[:MAX_ROW_BYTES] if too_long else raw, place, closed=end is not None, too_long=too_long)

    def _end(self) -> int | None:
        """Where the element that begins here ends; None where that is out of sight, or there is none."""
        if self._data[self._at : self._at + 1] not in (*_OPENING, b'"'):
            found = _SCALAR.match(self._data, self._at)
            assert found is not None
            whole = found.end() > self._at and (self._ended or found.end() < len(self._data))
            return found.end() if whole else None
        depth = 0
        for part in _PART.finditer(self._data, self._at):
            mark = part.group()
            if mark == b'"':
                return None
            if mark in _OPENING:
                depth += 1
            elif not mark.startswith(b'"'):
                depth -= 1
            if depth == 0:
                return part.end()
        return None

    def _skip(self) -> bool:
        """Pass over an element of any length, keeping none of it; say whether it ended."""
        depth, in_string = 0, False
        while True:
            seen = self._at
            for part in _MARK.finditer(self._data, self._at):
                seen = part.end()
                mark = part.group()
                if mark == b'"':
                    in_string = not in_string
                elif not in_string and mark[:1] != b"\\":
                    depth += 1 if mark in _OPENING else -1
                if depth == 0 and not in_string and mark[:1] != b"\\":
                    self._advance(seen)
                    return True
            # A backslash at the very end belongs to a byte that is not read yet.
            escape = not self._ended and self._data.endswith(b"\\") and seen < len(self._data)
            self._advance(len(self._data) - escape)
            if self._ended:
                return False
            self._look()
