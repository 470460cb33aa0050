"""Parquet: the columns `prompt` and `answer`, or `messages`, or others that `--map` gives these names."""

from qlora_pipe.dataset import Dataset
from qlora_pipe.rows import parquet_rows
from qlora_plugins.datasets.jsonl import example

DATASET = Dataset(
    name="parquet",
    help="parquet with prompt and answer, or with messages",
    rows=parquet_rows,
    example=example,
    fields=("prompt", "answer", "messages"),
)
