"""Plain text files as documents: a small file is one, a large one is cut at ends of lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qlora_pipe.errors import DataError
from qlora_pipe.rows.folder import data_files
from qlora_pipe.rows.packed_file import open_rows
from qlora_pipe.rows.row import MAX_ROW_BYTES, BadRow, Row
from qlora_pipe.rows.strict_json import UTF8_BOM, Place, decoded

DOCUMENT_BYTES = 2 << 20
"""The longest document; what is longer is several."""


def documents(path: Path) -> Iterator[Row | BadRow]:
    """Yield UTF-8 text as rows with the field `text`; line ends stay as they are.

    A file of at most 2 MiB is one document, and of a folder each `*.txt` file. A larger one is cut into documents of at
    most 2 MiB, each after the last line end that fits, or in a line that is longer between two characters.
    """
    for file, name in data_files(path, (".txt",)):
        with open_rows(file, name) as stream:
            for piece, line, is_all in _pieces(stream):
                origin = name if is_all else f"{name}:{line}"
                try:
                    text = decoded(piece, Place(name, line))
                    if not text.strip():
                        raise DataError(f"{origin}: the {'file' if is_all else 'document'} holds no text")
                except DataError as fault:
                    yield BadRow(reason=str(fault), raw=piece[:MAX_ROW_BYTES])
                    continue
                yield Row(fields={"text": text}, origin=origin, raw=piece)


def _pieces(stream: BinaryIO) -> Iterator[tuple[bytes, int, bool]]:
    """Each document's bytes, the line that it begins on, and whether it is the whole file."""
    data = stream.read(DOCUMENT_BYTES + 1).removeprefix(UTF8_BOM)
    if len(data) <= DOCUMENT_BYTES:
        yield data, 1, True
        return
    line = 1
    while data:
        end = len(data) if len(data) <= DOCUMENT_BYTES else _cut(data[:DOCUMENT_BYTES])
        piece = data[:end]
        yield piece, line, False
        line += piece.count(b"\n")
        data = data[end:] + stream.read(DOCUMENT_BYTES + 1 - (len(data) - end))


def _cut(data: bytes) -> int:
    """Where the last line ends, else where the last character begins."""
    end = data.rfind(b"\n") + 1
    if not end:
        end = len(data) - 1
        while end > len(data) - 4 and data[end] & 0xC0 == 0x80:
            end -= 1
    return end
