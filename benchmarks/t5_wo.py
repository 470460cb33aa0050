"""What do T5's `wo` matrices cost in 16 bits, and what do they lose in 4? Sizes, held-out loss, and a fine-tune's.

    python benchmarks/t5_wo.py [--data FOLDER] [--steps 200] [--seeds 3]

The model is FOLDER/models/t5-stories-280k. Its loss is taken on stories that FOLDER/models/stories260K tells, their
second half from their first, and before and after fine-tunes on Shakespeare, the next two lines from four. The sizes
of published models are counted from their configs. Prints two tables and writes benchmarks/results/t5_wo.json and
t5_wo_sizes.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import publish

REPOSITORY = Path(__file__).resolve().parent.parent
STORIES, PAIRS = 120, 800
# d_model, d_ff, heads of 64, blocks of each stack.
PUBLISHED = {
    "small": (512, 1024, 6, 8),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 16, 24),
    "XL": (2048, 5120, 32, 24),
    "XXL": (4096, 10240, 64, 24),
}
# NF4 with double quantisation.
BITS = 4 + 8 / 64 + 32 / (64 * 256)


def command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "qlora_pipe", *map(str, arguments)], check=True, capture_output=True)


def told_stories(folder: Path, out: Path) -> Path:
    """Stories of the model that the T5's own were told by, each cut in two at a space."""
    import torch

    from qlora_pipe.artifacts import Checkpoint
    from qlora_pipe.config import GenerateConfig
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.generate import continue_text

    torch.set_num_threads(1)
    model, manager = Checkpoint.open(folder / "models" / "stories260K"), load_plugins()
    rows = []
    for seed in range(STORIES):
        config = GenerateConfig(max_new_tokens=160, temperature=1.0, seed=seed, device="cpu")
        text = "Once upon a time" + "".join(continue_text(model, "Once upon a time", config, manager=manager))
        middle = text.index(" ", len(text) // 2)
        rows.append({"prompt": text[:middle], "answer": text[middle:]})
    return write_rows(out, rows)


def next_lines(folder: Path, out: Path) -> Path:
    """Four lines of Shakespeare, and the two that follow."""
    text = (folder / "datasets" / "tinyshakespeare" / "input.txt").read_text()
    lines = [line for line in text.splitlines() if line]
    starts = range(0, 6 * PAIRS, 6)
    return write_rows(
        out, [{"prompt": "\n".join(lines[at : at + 4]), "answer": "\n".join(lines[at + 4 : at + 6])} for at in starts]
    )


def write_rows(out: Path, rows: list[dict[str, str]]) -> Path:
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def bases(folder: Path, work: Path) -> dict[str, Path]:
    """The model itself, its store as the family has it, and one with `wo` in 4 bits, too."""
    from qlora_pipe.artifacts import Checkpoint
    from qlora_pipe.config import QuantizeConfig
    from qlora_pipe.hookspecs import hookimpl
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.quantize import quantize

    class Wo:
        @hookimpl
        def choose_precision(self, tensor: str) -> str | None:
            return "nf4" if tensor.endswith(".wo.weight") else None

    source = Checkpoint.open(folder / "models" / "t5-stories-280k")
    for name, plugins in (("kept", []), ("packed", [Wo()])):
        quantize(source, work / name, QuantizeConfig(), manager=load_plugins(*plugins))
    return {"as it is": source.path, "NF4, wo kept": work / "kept", "NF4, wo too": work / "packed"}


def losses(base: Path, run: Path, *settings: object) -> tuple[float, float]:
    """The held-out loss before the first step of a fine-tune and after the last."""
    fixed = ["--rank", 16, "--alpha", 64, "--batch-size", 8, "--max-tokens", 256, "--threads", 1, "--save-every", 0]
    command("finetune", base, "--out", run, *fixed, *settings)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines[0]["eval_loss_start"], lines[-1]["eval_loss"]


def measured(name: str, base: Path, work: Path, data: tuple[Path, Path], *, steps: int, seeds: int) -> dict[str, Any]:
    own, task = (f"jsonl:{path}" for path in data)
    run = work / f"run-{name}".replace(" ", "-").replace(",", "")
    own_loss, _ = losses(base, run / "own", "--data", own, "--eval-data", own, "--steps", 1)
    found = [
        losses(
            base, run / str(seed), "--data", task, "--held-out", 0.1, "--learning-rate", 2e-3, "--steps", steps,
            "--seed", seed,
        )
        for seed in range(seeds)
    ]  # fmt: skip
    ends = [round(end, 4) for _, end in found]
    return {
        "base": name,
        "loss, own stories": round(own_loss, 4),
        "before": round(statistics.mean(begin for begin, _ in found), 4),
        f"after {steps} steps": round(statistics.mean(ends), 4),
        "after, by seed": ends,
    }


def sizes(name: str) -> dict[str, Any]:
    """Gigabytes of a published model's linear layers in its blocks."""
    import torch

    from qlora_pipe.architecture import matches
    from qlora_plugins.t5 import register_architectures

    (family,) = register_architectures()
    hidden, inner, heads, blocks = PUBLISHED[name]
    fields = {"d_model": hidden, "d_ff": inner, "num_heads": heads, "d_kv": 64, "num_layers": blocks}
    with torch.device("meta"):
        model = family.build({**fields, "vocab_size": 32128, "pad_token_id": 0, "feed_forward_proj": "gated-gelu"})
    linears = {path: part.numel() for path, part in model.named_parameters() if matches(path, family.quantize)}
    wo = sum(count for path, count in linears.items() if path.endswith(".wo.weight"))
    others = sum(linears.values()) - wo
    gigabytes = {
        "in 16 bits": 2 * (others + wo),
        "NF4, wo kept": others * BITS / 8 + 2 * wo,
        "NF4, wo too": (others + wo) * BITS / 8,
    }
    return {"T5 v1.1": name, "weights, M": round((others + wo) / 1e6, 1), "of them wo, M": round(wo / 1e6, 1)} | {
        what: round(value / 1e9, 3) for what, value in gigabytes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("QLORA_PIPE_TEST_DATA", REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if not (options.data / "models" / "t5-stories-280k").is_dir():
        raise SystemExit(f"no t5-stories-280k in {options.data}/models: name the folder with --data")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = told_stories(options.data, work / "stories.jsonl"), next_lines(options.data, work / "lines.jsonl")
        rows = [
            measured(name, base, work, data, steps=options.steps, seeds=options.seeds)
            for name, base in bases(options.data, work).items()
        ]
    publish("t5_wo", rows=rows, peers=())
    publish("t5_wo_sizes", rows=[sizes(name) for name in PUBLISHED], peers=())


if __name__ == "__main__":
    main()
