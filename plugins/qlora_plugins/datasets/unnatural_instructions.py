"""Unnatural Instructions (arXiv 2212.09689): a row's instances, and in the full data its reformulations."""

from collections.abc import Iterator
from dataclasses import replace

from qlora_pipe.dataset import Dataset, Example, HubFiles, prompt_and_answer
from qlora_pipe.rows import Row, table_rows
from qlora_plugins.datasets.nested import nested_rows


def examples(row: Row) -> Iterator[Example]:
    """Give one example per instance, then one per reformulation where the row has any."""
    instances = nested_rows(row, "instances")
    if not instances:
        row.refuse("instances", "is empty")
    # Rows that nobody reformulated have null there, or no such field.
    reformulated = nested_rows(row, "reformulations") if row.fields.get("reformulations") is not None else []
    for item in instances + reformulated:
        yield prompt_and_answer(item.text("instruction_with_input"), item.text("output"), origin=item.origin)


DATASET = Dataset(
    name="unnatural-instructions",
    help="Unnatural Instructions: instances, and reformulations if the row has them",
    rows=table_rows,
    example=examples,
    hub=HubFiles(repo="mrm8488/unnatural-instructions-core", splits={"train": ("data/train-*.parquet",)}),
)
FULL = replace(
    DATASET,
    name="unnatural-instructions-full",
    help="Unnatural Instructions with the reformulations",
    hub=HubFiles(repo="mrm8488/unnatural-instructions-full", splits={"train": ("data/train-*.parquet",)}),
)
