"""Plain UTF-8 text, for continued pretraining: a file is one document, a folder one per `*.txt` file."""

from collections.abc import Iterator
from pathlib import Path

from qlora_pipe.dataset import Dataset, Example, Message
from qlora_pipe.errors import DataError
from qlora_pipe.rows import UTF8_BOM, Row, decoded


def rows(path: Path) -> Iterator[Row]:
    """Yield one document per file, in the order of the files' names; line ends stay as they are."""
    files = sorted(file for file in path.glob("*.txt") if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no *.txt file")
    for file in files:
        content = decoded(file.read_bytes().removeprefix(UTF8_BOM), file=file.name)
        if not content.strip():
            raise DataError(f"{file.name}: the file holds no text")
        yield Row(fields={"text": content}, origin=file.name)


def example(row: Row) -> Example:
    """Take the document as it is."""
    return Example(messages=(Message(role="text", content=row.fields["text"]),), origin=row.origin)


DATASET = Dataset(
    name="text", help="plain text, every token trained: a file, or a folder of *.txt files", rows=rows, example=example
)
