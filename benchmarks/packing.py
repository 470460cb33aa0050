"""What packing saves: the share of padding, and real tokens a second of training, of one sample a row and of several.

    python benchmarks/packing.py TOKENIZER NAME:PATH [NAME:PATH ...] [--max-tokens 512] [--copies 1] [--rounds 5]

TOKENIZER is a folder with tokenizer.json. Of the data only the lengths count: a LLaMA of random weights (width 256, 4
layers, adapters of rank 16) learns random tokens in float32 on a CPU, in bfloat16 on a GPU. --copies makes a large set
of a small one. A pass is 16 samples, or as many rows as hold 16; padding is not counted as tokens. Prints the table of
docs/data.md and writes benchmarks/results/packing.json.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from report import interleaved, publish

from qlora_pipe.config import FinetuneConfig
from qlora_pipe.data.batches import Batch, Stream
from qlora_pipe.data.encode import Encoder, Sample
from qlora_pipe.data.samples import load_samples
from qlora_pipe.data.templates import Templates
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.testing import filled, tiny_weights
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.recompute import RecomputePlan
from qlora_pipe.train.session import adapt

CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}
SAMPLES = 16
BATCHES = 3


def passes() -> BlockwisePass:
    """The model on a GPU if there is one, ready to train."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    family = find_architecture(load_plugins(), "llama")
    module = filled(family, CONFIG, tiny_weights(CONFIG, seed=0), dtype=dtype).to(device)
    model = LoadedModel(module, family, CONFIG, {}, dtype, device)
    adapt(model, FinetuneConfig(rank=16, dropout=0.0), start=None)
    module.train()
    return BlockwisePass(model, recompute=RecomputePlan("none"))


def samples_of(lengths: Sequence[int]) -> list[Sample]:
    """Random tokens, all trained, of these lengths."""
    draws = np.random.default_rng(0)
    return [
        Sample(
            ids=draws.integers(CONFIG["vocab_size"], size=length, dtype=np.int32),
            trained=np.arange(length) > 0,
            origin="",
        )
        for length in lengths
    ]


def rows_of_an_epoch(stream: Stream) -> int:
    position = 0
    while stream.place(position).epoch == 0:
        position += 1
    return position


def padding(stream: Stream, *, rows: int) -> float:
    """The share of padding over the first epoch."""
    batches = [stream.batch(position, rows=rows) for position in range(0, rows_of_an_epoch(stream), rows)]
    return 1 - sum(batch.tokens for batch in batches) / sum(batch.ids.numel() for batch in batches)


def runner(steps: BlockwisePass, batches: Sequence[Batch]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            (loss,) = steps.run([batch], divisor=batch.trained)
            float(loss)

    return run


def measure(spec: str, folder: Path, *, max_tokens: int, copies: int, rounds: int) -> dict[str, object]:
    tokenizer, manager = Tokenizer.open(folder), load_plugins()
    templates = Templates.open(folder, tokenizer, choice="guanaco", manager=manager)
    encoder = Encoder(tokenizer=tokenizer, max_tokens=1 << 20, templates=templates)
    found = load_samples(spec, encoder=encoder, manager=manager).samples
    lengths = [min(len(sample.ids), max_tokens) for sample in found] * copies
    samples = samples_of(lengths)
    apart, packed = Stream(samples, seed=0), Stream(samples, seed=0, row_tokens=max_tokens)
    rows = max(1, round(SAMPLES * rows_of_an_epoch(packed) / len(samples)))
    batches = {
        "apart": [apart.batch(number * SAMPLES, rows=SAMPLES) for number in range(BATCHES)],
        "packed": [packed.batch(number * rows, rows=rows) for number in range(BATCHES)],
    }
    steps = passes()
    timings = interleaved({name: runner(steps, each) for name, each in batches.items()}, rounds=rounds)
    tokens = {name: sum(batch.tokens for batch in each) for name, each in batches.items()}
    rate = {name: tokens[name] / timings[name].wall for name in batches}
    cpu_rate = {name: tokens[name] / timings[name].cpu for name in batches}
    return {
        "data": Path(spec.partition(":")[2]).name,
        "samples": len(samples),
        "mean tokens": float(np.mean(lengths)),
        "samples a row": len(samples) / rows_of_an_epoch(packed),
        "padding apart": padding(apart, rows=SAMPLES),
        "padding packed": padding(packed, rows=rows),
        "tokens/s apart": rate["apart"],
        "tokens/s packed": rate["packed"],
        "ratio": rate["packed"] / rate["apart"],
        "ratio by CPU seconds": cpu_rate["packed"] / cpu_rate["apart"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = [
        measure(spec, options.tokenizer, max_tokens=options.max_tokens, copies=options.copies, rounds=options.rounds)
        for spec in options.data
    ]
    publish("packing", rows=rows, peers=())


if __name__ == "__main__":
    main()
