"""Does 4-bit training match 16-bit LoRA? Held-out loss after the same fine-tune on 16-bit, NF4+DQ, NF4 and FP4 bases.

    python benchmarks/quality.py MODEL TEXT [--seeds 5] [--steps 1000] [--jobs 2]

MODEL is a 16-bit checkpoint, TEXT a plain text file: rank 16, learning rate 2e-3, 8 x 128 tokens a step, a tenth held
out by the seed. Prints the table of docs/quality.md and writes benchmarks/results/quality.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from report import publish

BASES = {
    "16-bit": None,
    "NF4 + DQ": ["--type", "nf4", "--double-quant"],
    "NF4": ["--type", "nf4", "--no-double-quant"],
    "FP4": ["--type", "fp4", "--no-double-quant"],
}
RECIPE = ["--rank", "16", "--learning-rate", "2e-3", "--batch-size", "8", "--max-tokens", "128", "--held-out", "0.1"]


class Outcome(NamedTuple):
    base: str
    seed: int
    start: float
    end: float


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "qlora_pipe", *arguments], check=True, capture_output=True)


def finetune(base: str, folder: Path, text: Path, work: Path, *, seed: int, steps: int) -> Outcome:
    run = work / f"{base.replace(' ', '')}-{seed}"
    settings = [*RECIPE, "--steps", str(steps), "--seed", str(seed), "--threads", "1", "--save-every", "0"]
    command("finetune", str(folder), "--data", f"text:{text}", "--out", str(run), *settings)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    outcome = Outcome(base, seed, lines[0]["eval_loss_start"], lines[-1]["eval_loss"])
    print(f"{base:9} seed {seed}  {outcome.start:.4f} -> {outcome.end:.4f}", file=sys.stderr, flush=True)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folders = {
            base: options.model if flags is None else work / base.replace(" ", "") for base, flags in BASES.items()
        }
        for base, flags in BASES.items():
            if flags is not None:
                command("quantize", str(options.model), str(folders[base]), *flags)
        with ThreadPoolExecutor(options.jobs) as pool:
            # Seed by seed, so that an interrupted benchmark has compared what it has run.
            tasks = [
                pool.submit(finetune, base, folders[base], options.text, work, seed=seed, steps=options.steps)
                for seed in range(options.seeds)
                for base in BASES
            ]
            outcomes = [task.result() for task in tasks]
    publish("quality", rows=[summary(base, outcomes, steps=options.steps) for base in BASES], peers=())


def summary(base: str, outcomes: list[Outcome], *, steps: int) -> dict[str, object]:
    """A row: means and standard deviations over the seeds, and the paired difference to the 16-bit base."""
    ends = {outcome.seed: outcome.end for outcome in outcomes if outcome.base == base}
    starts = {outcome.seed: outcome.start for outcome in outcomes if outcome.base == base}
    plain = {outcome.seed: outcome.end for outcome in outcomes if outcome.base == "16-bit"}
    ratios = [100 * (ends[seed] / plain[seed] - 1) for seed in ends]
    return {
        "base": base,
        "steps": steps,
        "seeds": len(ends),
        "before": statistics.mean(starts.values()),
        "after": statistics.mean(ends.values()),
        "deviation": deviation([*ends.values()]),
        "falls by %": statistics.mean(100 * (1 - ends[seed] / starts[seed]) for seed in ends),
        "against 16-bit %": statistics.mean(ratios),
        "its deviation": deviation(ratios),
        "after, by seed": [round(ends[seed], 5) for seed in sorted(ends)],
    }


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
