"""Plain UTF-8 text, for continued pretraining: a file is one document, a folder one per `*.txt` file."""

from qlora_pipe.dataset import Dataset, Example, Message
from qlora_pipe.rows import Row, documents


def example(row: Row) -> Example:
    """Take the document as it is."""
    return Example(messages=(Message(role="text", content=row.text("text")),), origin=row.origin)


DATASET = Dataset(
    name="text",
    help="plain text, every token trained: a file, or a folder of *.txt files",
    rows=documents,
    example=example,
)
