"""Stanford Alpaca's form: `instruction`, `input` and `output`, as a JSON array or one object a line."""

from qlora_pipe.dataset import Dataset, Example, prompt_and_answer
from qlora_pipe.rows import Row

# The two prompts of the Alpaca dataset. The space at their end is part of them.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)


def example(row: Row) -> Example:
    """Make a prompt and answer; every row has the three fields, `input` may be empty."""
    instruction = row.text("instruction")
    context = row.text("input", may_be_empty=True)
    form = WITH_INPUT if context else WITHOUT_INPUT
    prompt = form.format(instruction=instruction, input=context)
    return prompt_and_answer(prompt, row.text("output"), origin=row.origin)


DATASET = Dataset(
    name="alpaca",
    help="instruction, input and output, rendered with Alpaca's two prompts (JSON or JSONL)",
    example=example,
)
