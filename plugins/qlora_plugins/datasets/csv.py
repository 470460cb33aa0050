"""CSV and TSV: the columns `prompt` and `answer`, or others that `--map` gives these names."""

from qlora_pipe.dataset import Dataset
from qlora_pipe.rows import csv_rows
from qlora_plugins.datasets.jsonl import example

DATASET = Dataset(
    name="csv",
    help="CSV or TSV with the columns prompt and answer",
    rows=csv_rows,
    example=example,
    fields=("prompt", "answer"),
)
