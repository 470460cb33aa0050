"""The datasets that come with qlora_pipe: Alpaca's form, JSON Lines, and plain text."""

from qlora_pipe.dataset import Dataset
from qlora_pipe.hookspecs import hookimpl
from qlora_plugins.datasets import alpaca, jsonl, text


@hookimpl
def register_datasets() -> list[Dataset]:
    """Bring the three forms that most data comes in."""
    return [alpaca.DATASET, jsonl.DATASET, text.DATASET]
