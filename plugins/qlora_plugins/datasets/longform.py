"""LongForm (arXiv 2304.08460): an instruction, and the long text that follows it."""

from qlora_pipe.dataset import Dataset, Example, HubFiles, prompt_and_answer
from qlora_pipe.rows import Row, table_rows


def example(row: Row) -> Example:
    """Take `input` and `output`."""
    return prompt_and_answer(row.text("input"), row.text("output"), origin=row.origin)


DATASET = Dataset(
    name="longform",
    help="LongForm: input and output",
    rows=table_rows,
    example=example,
    hub=HubFiles(
        repo="akoksal/LongForm",
        splits={
            "train": ("dataset/train.json",),
            "val": ("dataset/val.json",),
            "test": ("dataset/test.json",),
        },
    ),
)
