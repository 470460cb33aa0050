"""Stanford Alpaca: `instruction`, `input` and `output`, and the cleaned edition of the same form."""

from dataclasses import replace

from qlora_pipe.dataset import Dataset, Example, HubFiles, Message
from qlora_pipe.rows import Row, table_rows


def example(row: Row) -> Example:
    """Make a question and its answer; every row has the three fields, `input` may be empty.

    The two prompts that the dataset is known for are the chat template of the same name.
    """
    question = row.text("instruction")
    context = row.text("input", may_be_empty=True)
    if context.strip():
        question += f"\n\n### Input:\n{context}"
    answer = row.text("output")
    messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Example(messages=messages, origin=row.origin, form="alpaca")


DATASET = Dataset(
    name="alpaca",
    help="Stanford Alpaca: instruction, input and output",
    rows=table_rows,
    example=example,
    hub=HubFiles(repo="tatsu-lab/alpaca", splits={"train": ("data/train-*.parquet",)}),
)
CLEANED = replace(
    DATASET,
    name="alpaca-cleaned",
    help="Alpaca, cleaned of mistakes: the same fields",
    hub=HubFiles(repo="yahma/alpaca-cleaned", splits={"train": ("alpaca_data_cleaned.json",)}),
)
