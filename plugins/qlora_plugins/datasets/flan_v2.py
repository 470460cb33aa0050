"""FLAN v2 (arXiv 2301.13688): `inputs` and `targets`, or the chain-of-thought collection's own .tsv files."""

from qlora_pipe.dataset import Dataset, Example, HubFiles, prompt_and_answer
from qlora_pipe.rows import Row


def example(row: Row) -> Example:
    """Take `inputs` and `targets`."""
    return prompt_and_answer(row.text("inputs"), row.text("targets"), origin=row.origin)


DATASET = Dataset(
    name="flan-v2",
    help="FLAN v2: inputs and targets, or .tsv files of its chain-of-thought part",
    example=example,
    hub=HubFiles(
        repo="Muennighoff/flan", splits={split: (f"{split}/*.jsonl",) for split in ("train", "validation", "test")}
    ),
)
