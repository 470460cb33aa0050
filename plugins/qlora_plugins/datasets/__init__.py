"""The datasets that come with qlora_pipe: Alpaca's form, tables of any kind, plain text, and any of the Hub's."""

from qlora_pipe.dataset import Dataset
from qlora_pipe.hookspecs import hookimpl
from qlora_plugins.datasets import alpaca, csv, hub, jsonl, parquet, text


@hookimpl
def register_datasets() -> list[Dataset]:
    """Bring the forms that most data comes in."""
    return [each.DATASET for each in (alpaca, csv, hub, jsonl, parquet, text)]
