"""Self-Instruct (arXiv 2212.10560): prompts and completions, or tasks with their instances."""

from collections.abc import Iterator

from qlora_pipe.dataset import Dataset, Example, HubFiles, prompt_and_answer
from qlora_pipe.rows import Row, table_rows
from qlora_plugins.datasets.nested import nested_rows

# Written out at the end of each completion, for a model whose EOS it was; here EOS is an id that follows every answer.
END_OF_TEXT = "<|endoftext|>"


def examples(row: Row) -> Iterator[Example]:
    """Take either form: one example for `prompt` and `completion`, one per instance for a task."""
    if not row.has("instances"):
        yield _completed(row)
        return
    instruction = row.text("instruction")
    instances = nested_rows(row, "instances")
    if not instances:
        row.refuse("instances", "is empty")
    for item in instances:
        context = item.text("input", may_be_empty=True)
        # Of the prompts that the authors made of a task, the one without words of its own.
        prompt = "".join(f"{part}\n\n" for part in (instruction, context) if part.strip())
        yield prompt_and_answer(prompt, item.text("output"), origin=item.origin)


def _completed(row: Row) -> Example:
    prompt = row.text("prompt")
    completion = row.text("completion").removesuffix(END_OF_TEXT)
    if not completion.strip():
        row.refuse("completion", f"is empty but for {END_OF_TEXT}")
    return prompt_and_answer(prompt, completion, origin=row.origin)


DATASET = Dataset(
    name="self-instruct",
    help="Self-Instruct: prompt and completion, or tasks with instances",
    rows=table_rows,
    example=examples,
    # The authors' own repository holds a program and no rows.
    hub=HubFiles(
        repo="HuggingFaceH4/self_instruct",
        splits={"train": ("data/train-*.parquet",), "test": ("data/test-*.parquet",)},
    ),
)
