"""What does LoftQ gain? Weight error and held-out loss with an adapter to start from, against NF4 with B = 0.

    python benchmarks/loftq.py [--data FOLDER] [--steps 100] [--seeds 3] [--jobs 2]

Two models: stories260K from FOLDER/models, fine-tuned on Shakespeare from FOLDER/datasets (left out, with a sentence,
where they are absent), and the demo's embedded base, fine-tuned on its skill. Per base and rank: the mean relative
error of the adapted weights without and with the adapter, the loss on text of the model's own kind, the held-out loss
of the fine-tune's data before the first step and after the last. Prints a table and writes
benchmarks/results/loftq.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from report import publish

REPOSITORY = Path(__file__).resolve().parent.parent
RANKS = (4, 16, 64)
# The rank of the fine-tunes that are carried to their end.
TRAINED_RANK = 16
ITERATIONS = {"16-bit": None, "NF4, B = 0": 0, "LoftQ, 1 iteration": 1, "LoftQ, 5 iterations": 5}
STORIES, TALES = 64, 400


@dataclass(frozen=True)
class Subject:
    """A model, text of the kind that it was trained on, and what it is fine-tuned on."""

    name: str
    folder: Path
    own_text: Path
    data: str


@dataclass(frozen=True)
class Start:
    """A base with what is put on it before the first step."""

    label: str
    rank: int
    base: Path
    adapter: Path | None
    errors: tuple[float, float]


def command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "qlora_pipe", *map(str, arguments)], check=True, capture_output=True)


def stories(folder: Path, work: Path) -> Subject:
    """The stories model, with stories of its own: above the 16-bit loss on them a loss is a divergence from it."""
    import torch

    from qlora_pipe.artifacts import Checkpoint
    from qlora_pipe.config import GenerateConfig
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.generate import continue_text

    torch.set_num_threads(1)
    model, manager = Checkpoint.open(folder / "models" / "stories260K"), load_plugins()
    told = []
    for seed in range(STORIES):
        config = GenerateConfig(max_new_tokens=200, temperature=1.0, seed=seed, device="cpu")
        told.append("Once upon a time" + "".join(continue_text(model, "Once upon a time", config, manager=manager)))
    text = work / "stories.txt"
    text.write_text("\n\n".join(told))
    shakespeare = folder / "datasets" / "tinyshakespeare" / "input.txt"
    return Subject("stories260K", model.path, text, f"text:{shakespeare}")


def demo(work: Path) -> Subject:
    """The demo's base, with tales it has not seen."""
    from qlora_pipe.demo.corpus import tales

    text = work / "tales.txt"
    text.write_text("\n\n".join(tales(seed=10**6, count=TALES)))
    folder = REPOSITORY / "qlora_pipe" / "demo"
    return Subject("demo base", folder / "base", text, f"jsonl:{folder / 'skill.jsonl'}")


def starts(subject: Subject, work: Path) -> Iterator[Start]:
    for label, iterations in ITERATIONS.items():
        # What starts from B = 0 starts the same with any rank.
        for rank in RANKS if iterations else (TRAINED_RANK,):
            if iterations is None:
                yield Start(label, rank, subject.folder, None, (0.0, 0.0))
                continue
            # Without an adapter, one of one iteration measures all the same what the ordinary store has lost.
            init = f"loftq:{max(1, iterations)}"
            store = work / f"{subject.name}-{iterations}-{rank}".replace(" ", "-")
            command("quantize", subject.folder, store, "--adapter-init", init, "--adapter-rank", rank)
            adapter = store.with_name(f"{store.name}-loftq")
            manifest = json.loads((adapter / "qlora_pipe.json").read_text())
            errors = manifest["files"]["adapter_model.safetensors"]["facts"]["layers"].values()
            before, after = (statistics.mean(column) for column in zip(*errors, strict=True))
            if iterations == 0:
                yield Start(label, rank, store, None, (before, before))
            else:
                yield Start(label, rank, store, adapter, (before, after))


def losses(start: Start, run: Path, *settings: object) -> tuple[float, float]:
    """The held-out loss before the first step of a fine-tune and after the last."""
    if not (run / "final").exists():
        how = ["--adapter", start.adapter] if start.adapter else ["--rank", start.rank, "--alpha", start.rank]
        fixed = ["--dropout", 0, "--batch-size", 8, "--max-tokens", 128, "--threads", 1, "--save-every", 0]
        command("finetune", start.base, "--out", run, *how, *fixed, *settings)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines[0]["eval_loss_start"], lines[-1]["eval_loss"]


def row(subject: Subject, start: Start, work: Path, *, steps: int, seeds: int) -> dict[str, object]:
    name = f"{subject.name}-{start.label}-{start.rank}".replace(" ", "").replace(",", "-")
    own = f"text:{subject.own_text}"
    own_loss, _ = losses(start, work / f"{name}-own", "--data", own, "--eval-data", own, "--steps", 1)
    trained = steps if start.rank == TRAINED_RANK else 1
    found = [
        losses(
            start, work / f"{name}-{seed}", "--data", subject.data, "--held-out", 0.1, "--learning-rate", 2e-3,
            "--steps", trained, "--seed", seed,
        )
        for seed in range(seeds)
    ]  # fmt: skip
    ends = [round(end, 5) for _, end in found] if trained > 1 else []
    print(f"{subject.name}, {start.label}, rank {start.rank}: done", file=sys.stderr, flush=True)
    return {
        "model": subject.name,
        "base": start.label,
        "rank": start.rank,
        "error of Q %": 100 * start.errors[0],
        "of Q + BA %": 100 * start.errors[1],
        "loss, own text": own_loss,
        "before": statistics.mean(begin for begin, _ in found),
        f"after {steps} steps": statistics.mean(ends) if ends else "",
        "after, by seed": ends or "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("QLORA_PIPE_TEST_DATA", REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        subjects = [demo(work)]
        if (options.data / "models" / "stories260K").is_dir():
            subjects.insert(0, stories(options.data, work))
        else:
            print(f"no stories260K in {options.data}: the embedded base alone is measured", file=sys.stderr)
        with ThreadPoolExecutor(options.jobs) as pool:
            tasks = [
                pool.submit(row, subject, start, work, steps=options.steps, seeds=options.seeds)
                for subject in subjects
                for start in starts(subject, work)
            ]
            publish("loftq", rows=[task.result() for task in tasks], peers=())


if __name__ == "__main__":
    main()
