"""Anthropic's HH-RLHF (arXiv 2204.05862): of two conversations, the one that was chosen."""

import re

from qlora_pipe.dataset import Dataset, Example, HubFiles
from qlora_pipe.rows import Row, table_rows
from qlora_plugins.datasets.turns import answered, turns

MARKER = re.compile(r"\n\n(Human|Assistant):")
_PARTS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


def example(row: Row) -> Example:
    """Take `chosen`; `rejected` is not looked at."""
    messages = turns(row, "chosen", row.text("chosen"), marker=MARKER, human="Human")
    return Example(messages=answered(row, "chosen", messages), origin=row.origin)


DATASET = Dataset(
    name="hh-rlhf",
    help="HH-RLHF: the chosen conversation",
    rows=table_rows,
    example=example,
    hub=HubFiles(
        repo="Anthropic/hh-rlhf",
        splits={split: tuple(f"{part}/{split}.jsonl.gz" for part in _PARTS) for split in ("train", "test")},
    ),
)
