"""A QLoRA training step on a CPU against transformers + peft + bitsandbytes, and against its matrix products alone.

    python benchmarks/cpu_train.py [--rounds 12] [--curve 50] [--cells float32:native:all ...]

A LLaMA of 110M parameters, NF4 with double quantization, rank 16 on all linear layers, 4 x 256 tokens a step, no
recomputation on either side. Each side runs in a process of its own and does a step when it is its turn, so that a busy
moment meets all. On a shared machine a neighbour can take a core for seconds, and a step with all threads waits for the
slowest: beside the median, each side's fastest step says what it does undisturbed.

A cell is dtype:instructions:threads; `avx2` holds torch, its libraries and our C to AVX2, as on the processors where
bfloat16 has no instructions of its own (the peer's C asks the processor alone). Writes results/cpu_train.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from report import publish, published
from train_worker import Side, Task

from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint

# LLaMA of 110M parameters, what the figures of the comparison are quoted for.
SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 8192, "max_position_embeddings": 2048,
}  # fmt: skip
SIDES = ("ours", "peer", "matmuls")
# What holds torch, its matrix libraries and our own C to the instructions of an older processor.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "QLORA_PIPE_CPU": "avx2",
}  # fmt: skip


class Cell(NamedTuple):
    """One row of the table."""

    dtype: str
    instructions: str
    threads: int
    batch: int = 4
    tokens: int = 256

    @classmethod
    def parse(cls, text: str) -> Self:
        dtype, instructions, threads = text.split(":")
        cell = cls(dtype, instructions, (os.cpu_count() or 1) if threads == "all" else int(threads))
        # The peer's bfloat16 gives four tokens a second there: a smaller step, for both.
        return cell._replace(batch=1, tokens=128) if (dtype, instructions) == ("bfloat16", "avx2") else cell

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells its row from others."""
        return self.dtype, self.instructions, self.threads

    def task(self, work: Path) -> Task:
        dtype, device = getattr(torch, self.dtype), torch.device("cpu")
        return Task(work, dtype, device, self.threads, self.batch, self.tokens, recompute="none")


def environment(cell: Cell) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(cell.threads)} | (AVX2 if cell.instructions == "avx2" else {})


def measure(cell: Cell, work: Path, *, rounds: int, curve: int) -> dict[str, object]:
    """Time the sides in turn; then let ours and the peer go on to the curve's end."""
    sides = {role: Side(role, cell.task(work), environment=environment(cell)) for role in SIDES}
    steps: dict[str, list[dict[str, Any]]] = {role: [] for role in SIDES}
    for number in range(rounds + 1):
        for role, side in sides.items():
            steps[role].append(side.step(number))
    sides.pop("matmuls").close()
    for number in range(rounds + 1, curve):
        for role, side in sides.items():
            steps[role].append(side.step(number))
    for side in sides.values():
        side.close()
    # The first round is the warm-up.
    timed = {role: [step["seconds"] for step in steps[role][1 : rounds + 1]] for role in SIDES}
    seconds = {role: statistics.median(found) for role, found in timed.items()}
    fastest = {role: min(found) for role, found in timed.items()}
    cpu = {role: statistics.median(step["cpu_seconds"] for step in steps[role][1 : rounds + 1]) for role in SIDES}
    losses = {role: [round(step["loss"], 5) for step in steps[role]] for role in ("ours", "peer")}
    tokens = cell.batch * cell.tokens
    print(f"{cell}: ours {losses['ours'][0]} -> {losses['ours'][-1]}, peer {losses['peer'][0]} -> {losses['peer'][-1]}")
    return {
        "dtype": cell.dtype,
        "instructions": cell.instructions,
        "threads": cell.threads,
        "tokens a step": tokens,
        "ours tok/s": tokens / seconds["ours"],
        "peer tok/s": tokens / seconds["peer"],
        "times the peer": seconds["peer"] / seconds["ours"],
        "matmuls tok/s": tokens / seconds["matmuls"],
        "of the matmuls": seconds["matmuls"] / seconds["ours"],
        "fastest: ours tok/s": tokens / fastest["ours"],
        "fastest: times the peer": fastest["peer"] / fastest["ours"],
        "fastest: of the matmuls": fastest["matmuls"] / fastest["ours"],
        "ours CPU s": cpu["ours"],
        "peer CPU s": cpu["peer"],
        "ours MiB": steps["ours"][rounds]["peak_rss_mib"],
        "peer MiB": steps["peer"][rounds]["peak_rss_mib"],
        "step 1 differs by": abs(steps["ours"][0]["loss"] - steps["peer"][0]["loss"]),
        "last differs by": abs(steps["ours"][-1]["loss"] - steps["peer"][-1]["loss"]),
        "curves": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--curve", type=int, default=50)
    cells = [
        f"{dtype}:{isa}:{n}" for isa in ("native", "avx2") for dtype in ("float32", "bfloat16") for n in ("all", 1)
    ]
    parser.add_argument("--cells", nargs="+", default=cells, help="measure these; rows of others stay as they are")
    options = parser.parse_args()
    measured = {Cell.parse(text).key: text for text in options.cells}
    rows = [
        row for row in published("cpu_train") if (row["dtype"], row["instructions"], row["threads"]) not in measured
    ]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        tiny_checkpoint(work / "source", **SHAPE)
        if execute(["quantize", str(work / "source"), str(work / "store")]) != 0:
            sys.exit("the store could not be made")
        subprocess.run(Cell("float32", "native", 1).task(work).words("prepare"), check=True)
        for text in options.cells:
            cell = Cell.parse(text)
            # One curve for each type; elsewhere the first steps' losses are compared.
            whole = cell.instructions == "native" and cell.threads > 1
            rounds = min(options.rounds, 2 if cell.tokens < 256 else 4 if cell.threads == 1 else options.rounds)
            rows.append(measure(cell, work, rounds=rounds, curve=options.curve if whole else 0))
            publish("cpu_train", rows=rows, peers=("transformers", "peft", "bitsandbytes"))


if __name__ == "__main__":
    main()
