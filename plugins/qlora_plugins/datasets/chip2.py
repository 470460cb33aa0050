r"""Chip2 of LAION's OIG: conversations as `<human>: ...\n<bot>: ...`."""

import re

from qlora_pipe.dataset import Dataset, Example, HubFiles
from qlora_pipe.rows import Row, table_rows
from qlora_plugins.datasets.turns import answered, turns

MARKER = re.compile(r"(?:\A|\n)<(human|bot)>:")


def example(row: Row) -> Example:
    """Take `text`."""
    messages = turns(row, "text", row.text("text"), marker=MARKER, human="human")
    return Example(messages=answered(row, "text", messages), origin=row.origin)


DATASET = Dataset(
    name="chip2",
    help="OIG's Chip2: turns of <human> and <bot>",
    rows=table_rows,
    example=example,
    hub=HubFiles(repo="laion/OIG", splits={"train": ("unified_chip2.jsonl",)}),
)
