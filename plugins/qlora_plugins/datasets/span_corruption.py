"""Plain text with spans to fill in, for continued pretraining of encoder-decoder models (T5's own objective)."""

from dataclasses import replace

from qlora_pipe.dataset import SPAN_CORRUPTION, Dataset, Example
from qlora_pipe.rows import Row
from qlora_plugins.datasets import text


def example(row: Row) -> Example:
    """Take the document as it is; spans are dropped from its tokens."""
    return replace(text.example(row), form=SPAN_CORRUPTION)


DATASET = Dataset(
    name=SPAN_CORRUPTION,
    help="plain text with spans to fill in, T5's objective: a file, or a folder of *.txt files",
    rows=text.DATASET.rows,
    example=example,
)
