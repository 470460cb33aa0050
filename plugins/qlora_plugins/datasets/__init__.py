"""The datasets that come with qlora_pipe: eight of instructions, one file each, and the forms of most other data."""

from qlora_pipe.dataset import Dataset
from qlora_pipe.hookspecs import hookimpl
from qlora_plugins.datasets import (
    alpaca,
    chip2,
    csv,
    flan_v2,
    hh_rlhf,
    hub,
    jsonl,
    longform,
    oasst1,
    parquet,
    self_instruct,
    span_corruption,
    text,
    unnatural_instructions,
)


@hookimpl
def register_datasets() -> list[Dataset]:
    """Bring the datasets of the QLoRA paper and the forms that most data comes in."""
    return [
        alpaca.DATASET,
        alpaca.CLEANED,
        chip2.DATASET,
        flan_v2.DATASET,
        hh_rlhf.DATASET,
        longform.DATASET,
        oasst1.DATASET,
        self_instruct.DATASET,
        unnatural_instructions.DATASET,
        unnatural_instructions.FULL,
        csv.DATASET,
        hub.DATASET,
        jsonl.DATASET,
        parquet.DATASET,
        span_corruption.DATASET,
        text.DATASET,
    ]
