"""FLAN v2 (arXiv 2301.13688): `inputs` and `targets`, or the chain-of-thought collection's own .tsv files."""

from collections.abc import Iterator
from pathlib import Path

from qlora_pipe.dataset import Dataset, Example, HubFiles, prompt_and_answer
from qlora_pipe.rows import TABLES, BadRow, Row, separated_rows
from qlora_pipe.rows.folder import data_files, has_ending
from qlora_pipe.rows.tables import read_table

_COLUMNS = ("question", "answer", "explanation")


def rows(path: Path) -> Iterator[Row | BadRow]:
    """Read .tsv files as the chain-of-thought collection writes them, without a header, and all others as tables."""
    for file, name in data_files(path, TABLES):
        if has_ending(name, (".tsv",)):
            yield from separated_rows(file, separator="\t", columns=_COLUMNS, name=name)
        else:
            yield from read_table(file, name)


def example(row: Row) -> Example:
    """Take `inputs` and `targets`; of a thought, the explanation and what follows from it as the answer."""
    if not row.has("explanation"):
        return prompt_and_answer(row.text("inputs"), row.text("targets"), origin=row.origin)
    question, answer, explanation = (_lines(row, name) for name in _COLUMNS)
    return prompt_and_answer(question, f"{explanation} So the final answer is {answer}.", origin=row.origin)


def _lines(row: Row, name: str) -> str:
    """A cell's text, in which a line end is written as a backslash and an n."""
    return row.checked_text(name, row.text(name).replace("\\n", "\n"))


DATASET = Dataset(
    name="flan-v2",
    help="FLAN v2: inputs and targets, or its chain-of-thought .tsv files",
    rows=rows,
    example=example,
    hub=HubFiles(
        repo="Muennighoff/flan", splits={split: (f"{split}/*.jsonl",) for split in ("train", "validation", "test")}
    ),
)
