"""What memory training data takes: a file of rows is tokenised, kept on disk and trained on, at several file sizes.

    python benchmarks/stream_rows.py [--gb 2] [--sizes 3] [--folder FOLDER] [--rows 2000]

Writes a JSON Lines file of --gb gigabytes, and before it one of a fourth of that and so on, --sizes of them, in rows of
about --rows bytes, some 400 of which are prompt and answer. For each, in a process of its own: hash the file, make the
samples, hold out a tenth, pack an epoch, take two training steps and go through a thousand samples on a tiny model;
then the same again, which finds its samples made. Prints the peak of resident memory before the data is touched, with
the samples made, and with them found, and writes benchmarks/results/stream_rows.json. FOLDER takes about twice the
file's size; what is put there is removed again.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from report import publish
from tokenizers import models, pre_tokenizers, processors, trainers

from qlora_pipe.config import FinetuneConfig
from qlora_pipe.data.batches import Stream, eval_batches
from qlora_pipe.data.encode import Encoder
from qlora_pipe.data.samples import load_samples, split_held_out
from qlora_pipe.data.templates import Templates
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.testing import filled, tiny_weights
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.loss import summed_loss
from qlora_pipe.train.recompute import RecomputePlan
from qlora_pipe.train.session import adapt

MAX_TOKENS = 512
EVALUATED = 1000
_MIB = 1 << 20


def words() -> NDArray[np.str_]:
    """The 4096 words that all texts are made of."""
    draws = np.random.default_rng(0)
    letters = (draws.integers(97, 123, size=size, dtype=np.uint8) for size in draws.integers(2, 9, size=4096))
    return np.array([word.tobytes().decode() for word in letters])


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 8192 tokens that was trained on the words."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([" ".join(words())] * 4, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(raw.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def write_rows(path: Path, *, n_bytes: int, row_bytes: int) -> int:
    """Fill a file with rows of random words, of which some 70 are prompt and answer; give the number of rows."""
    draws = np.random.default_rng(0)
    known = words()
    rows = written = 0
    with path.open("w") as file:
        while written < n_bytes:
            lengths = draws.integers(row_bytes // 14, row_bytes // 4, size=256)
            for length in lengths.tolist():
                text = known[draws.integers(len(known), size=length)]
                parts = {"prompt": text[:16], "answer": text[16 : length % 117 + 18], "notes": text[60:]}
                row = {name: " ".join(part) for name, part in parts.items()}
                written += file.write(json.dumps({"number": rows, **row}) + "\n")
                rows += 1
    return rows


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def model(vocab_size: int) -> LoadedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {**sizes, "num_key_value_heads": 2, "vocab_size": vocab_size, "tie_word_embeddings": True}
    family = find_architecture(load_plugins(), "llama")
    module = filled(family, config, tiny_weights(config, seed=0), dtype=torch.float32)
    return LoadedModel(module, family, config, {}, torch.float32, torch.device("cpu"))


def work(path: Path, tokenizer_folder: Path, cache: Path) -> None:
    """What one process does; prints what it measured."""
    tokenizer = Tokenizer.open(tokenizer_folder)
    ready = model(tokenizer.vocab_size)
    adapt(ready, FinetuneConfig(rank=4, dropout=0.0), start=None)
    ready.module.train()
    step = BlockwisePass(ready, recompute=RecomputePlan("none"))
    before, begun = peak_mib(), time.monotonic()
    manager = load_plugins()
    templates = Templates.open(tokenizer_folder, tokenizer, choice="auto", manager=manager)
    encoder = Encoder(tokenizer=tokenizer, max_tokens=MAX_TOKENS, templates=templates)
    found = load_samples(f"jsonl:{path}", encoder=encoder, manager=manager, cache=cache)
    seconds, loaded = time.monotonic() - begun, peak_mib()
    train, held_out = split_held_out(found.samples, share=0.1, seed=0)
    stream = Stream(train, seed=0, row_tokens=MAX_TOKENS)
    for position in (0, 4):
        batch = stream.batch(position, rows=4)
        (loss,) = step.run([batch], divisor=batch.trained)
        assert torch.isfinite(loss)
    with torch.no_grad():
        for batch in eval_batches(held_out[:EVALUATED], batch_size=4):
            assert torch.isfinite(summed_loss(ready, batch))
    measured = {
        "rows": found.stats.rows, "tokens": found.stats.tokens, "tokenised": found.tokenised, "seconds": seconds,
        "before": before, "loaded": loaded, "trained": peak_mib(),
    }  # fmt: skip
    print(json.dumps(measured))


def measured(*places: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--work", *map(str, places)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def row(path: Path, tokenizer: Path, cache: Path) -> dict[str, object]:
    first, second = measured(path, tokenizer, cache), measured(path, tokenizer, cache)
    assert first["tokenised"] == first["rows"]
    assert second["tokenised"] == 0
    kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    size = path.stat().st_size
    return {
        "file, GB": size / 1e9,
        "rows": first["rows"],
        "tokens": first["tokens"],
        "kept, GB": kept / 1e9,
        "peak before the data, MiB": first["before"],
        "samples made, MiB": first["loaded"],
        "and trained on, MiB": first["trained"],
        "samples found, MiB": second["loaded"],
        "then trained on, MiB": second["trained"],
        "bytes a row over the least": 0.0,
        "seconds to make": first["seconds"],
        "seconds to find": second["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the largest file")
    parser.add_argument("--sizes", type=int, default=3, help="how many sizes, each a fourth of the next")
    parser.add_argument("--folder", type=Path, default=None, help="where files are put, else the system's own")
    parser.add_argument("--rows", type=int, default=2000, help="bytes of a row, about")
    parser.add_argument("--work", type=Path, nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(*options.work)
        return
    rows: list[dict[str, object]] = []
    for less in reversed(range(options.sizes)):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder) / "rows.jsonl"
            write_tokenizer(Path(folder) / "tokenizer")
            write_rows(path, n_bytes=int(options.gb * 1e9 / 4**less), row_bytes=options.rows)
            rows.append(row(path, Path(folder) / "tokenizer", Path(folder) / "kept"))
    least = rows[0]
    for each in rows[1:]:
        more = float(str(each["and trained on, MiB"])) - float(str(least["and trained on, MiB"]))
        each["bytes a row over the least"] = more * _MIB / (int(str(each["rows"])) - int(str(least["rows"])))
    publish("stream_rows", rows=rows, peers=("numpy", "tokenizers"))


if __name__ == "__main__":
    main()
