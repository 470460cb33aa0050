"""QLoRA training on a GPU against transformers + peft + bitsandbytes: tokens/s, peak memory, and the same losses.

    python benchmarks/gpu_train.py [--quick] [--model CHECKPOINT]

A LLaMA of 8B shape with random weights (`--quick`: 8 of its 32 layers), NF4 with double quantization, rank 16 on all
linear layers, bfloat16, full rows. Both sides keep all activations, or both compute them again; a further row lets ours
choose. Each side has the GPU to itself, in turn; `matmuls` is the time of the step's matrix products alone. With
`--model`, a real 16-bit checkpoint is trained by both as well, from the same adapters, and their losses compared.
Writes results/gpu_train.json.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu import require_gpu
from hollow import SHAPES, hollow_store
from report import publish
from train_worker import Side, Task

from qlora_pipe.cli import execute

QUICK_LAYERS = 8
# Tokens of a row, and rows.
SIZES = ((2048, 1), (2048, 4))


def steps_of(role: str, task: Task, *, steps: int) -> list[dict[str, Any]]:
    """Let one side do some steps with the GPU to itself."""
    side = Side(role, task)
    found = [side.step(number) for number in range(steps)]
    side.close()
    return found


def median(steps: list[dict[str, Any]], key: str) -> float:
    """Of the steps after the two that warm up."""
    return statistics.median(step[key] for step in steps[2:])


def compare(name: str, work: Path, *, batch: int, tokens: int, ours: str, peer: str, steps: int) -> dict[str, object]:
    """One row: ours and the peer with these ways to recompute, and the products alone."""

    def task(recompute: str) -> Task:
        return Task(work, torch.bfloat16, torch.device("cuda"), 8, batch, tokens, recompute)

    sides = {
        "ours": steps_of("ours", task(ours), steps=steps),
        "peer": steps_of("peer", task(peer), steps=steps),
        "matmuls": steps_of("matmuls", task("none"), steps=5),
    }
    seconds = {role: median(found, "seconds") for role, found in sides.items()}
    mine, theirs = sides["ours"], sides["peer"]
    return {
        "model": name,
        "tokens a step": batch * tokens,
        "recompute, ours": ours,
        "peer": peer,
        "ours tok/s": batch * tokens / seconds["ours"],
        "peer tok/s": batch * tokens / seconds["peer"],
        "times the peer": seconds["peer"] / seconds["ours"],
        "of the matmuls": seconds["matmuls"] / seconds["ours"],
        "ours MiB": median(mine, "peak_mib"),
        "peer MiB": median(theirs, "peak_mib"),
        "memory of the peer": median(mine, "peak_mib") / median(theirs, "peak_mib"),
        "step 1 differs by": abs(mine[0]["loss"] - theirs[0]["loss"]),
        "last differs by": abs(mine[-1]["loss"] - theirs[-1]["loss"]),
        "curves": {"ours": [step["loss"] for step in mine], "peer": [step["loss"] for step in theirs]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    require_gpu()
    steps = 5 if options.quick else 12
    rows: list[dict[str, object]] = []

    def add(row: dict[str, object]) -> None:
        rows.append(row)
        publish("gpu_train", rows=rows, peers=("transformers", "peft", "bitsandbytes"))

    with tempfile.TemporaryDirectory() as name:
        work, shape = Path(name) / "large", SHAPES["8B"]
        if options.quick:
            shape = shape._replace(layers=QUICK_LAYERS)
        hollow_store(work / "store", shape, shard_mib=4096, content="noise")
        prepare(work)
        described = f"8B shape, {shape.layers} layers"
        for tokens, batch in SIZES[: 1 if options.quick else None]:
            for ours, peer in (("all", "all"), ("auto", "all"), ("none", "none")):
                add(compare(described, work, batch=batch, tokens=tokens, ours=ours, peer=peer, steps=steps))
        if options.model is not None:
            small = Path(name) / "small"
            if execute(["quantize", str(options.model), str(small / "store")]) != 0:
                sys.exit("the store could not be made")
            prepare(small)
            add(compare(options.model.name, small, batch=8, tokens=128, ours="auto", peer="none", steps=50))


def prepare(work: Path) -> None:
    """Make the adapters' first values, on the CPU."""
    task = Task(work, torch.bfloat16, torch.device("cpu"), 8, 1, 1, "all")
    subprocess.run(task.words("prepare"), check=True)


if __name__ == "__main__":
    main()
