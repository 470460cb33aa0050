"""The dataset riddles: a question and its answer in each row."""

from qlora_pipe.dataset import Dataset, Example, prompt_and_answer
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.rows import Row


def example(row: Row) -> Example:
    """Turn one row into a prompt and its answer; DataError where it can't be used."""
    question = row.text("question")
    if not question.endswith("?"):
        row.refuse("question", "has no question mark")
    return prompt_and_answer(f"{question} ", row.text("answer"), origin=row.origin)


DATASET = Dataset(
    name="riddles",
    help="a question and its answer in each row (JSON or JSONL)",
    example=example,
    fields=("question", "answer"),
)


@hookimpl
def register_datasets() -> list[Dataset]:
    """Bring the dataset."""
    return [DATASET]
