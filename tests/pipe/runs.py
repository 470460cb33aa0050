"""Small runs: what they are made from, the command line that makes one, and what two of them have in common."""

import json
from pathlib import Path
from typing import Any

from qlora_formats.journal import survey
from qlora_formats.target import partial_path
from qlora_pipe.testing import tiny_checkpoint
from tests.pipe.kill import Nursery, Work

# The smallest LLaMA that has everything: grouped keys, an untied head, several blocks of 64 weights.
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SETTINGS = {
    "steps": 6,
    "batch_size": 2,
    "accumulate": 2,
    "learning_rate": 5e-3,
    "rank": 3,
    "dropout": 0.1,
    "eval_every": 2,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
}


def small_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A float32 LLaMA of 12,000 weights in `folder`."""
    return tiny_checkpoint(folder, **{**SMALL, **overrides})


def write_rows(path: Path, *, count: int = 13) -> Path:
    """Prompts and answers of uneven lengths."""
    rows = [{"prompt": f"{'count ' * (1 + n % 3)}to {n}: ", "answer": "*" * (1 + 5 * n % 7)} for n in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(stage: str, *arguments: object, **settings: Any) -> list[str]:
    """A command line: the arguments, then a flag per setting, True being the flag alone; None leaves a setting out."""
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items() if value is not None]
    words = (word for name, value in flags for word in ([name] if value is True else [name, value]))
    return [str(word) for word in (stage, *arguments, *words)]


def finetune_line(base: Path, rows: Path, out: Path, **settings: Any) -> list[str]:
    """`qlora-pipe finetune` with SETTINGS, in which `settings` replace or, as None, remove some."""
    return command("finetune", base, data=f"jsonl:{rows}", out=out, **{**SETTINGS, **settings})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def outcome(run: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """What two runs of one command have in common: the bytes of final/, and the metrics but for their times."""
    return contents(run / "final"), [{**step, "seconds": None} for step in metrics(run)]


def works(nursery: Nursery, folder: Path) -> dict[str, Work]:
    """One work per stage that makes something, each with several commits; what they start from is made in `folder`."""
    rows = write_rows(folder / "rows.jsonl")
    source = small_checkpoint(
        folder / "source", hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4
    )
    small, store, run = folder / "small", folder / "store", folder / "run"
    for line in (
        command("quantize", small_checkpoint(folder / "small-source"), small),
        command("quantize", source, store),
        finetune_line(store, rows, run, steps=1),
    ):
        child = nursery.start(line)
        assert child.wait() == 0, child.said()
    return {
        "finetune": Work(
            arguments=lambda out: finetune_line(small, rows, out, steps=8, save_every=1),
            begun=lambda out: any(out.glob("checkpoints/step-*")),
            finished=lambda out: (out / "final").exists(),
            outcome=outcome,
        ),
        "quantize": Work(
            arguments=lambda out: command("quantize", source, out, shard_mib=1),
            begun=_holds_a_finished_file,
            finished=Path.exists,
            outcome=contents,
        ),
        "merge": Work(
            arguments=lambda out: command("merge", store, run, out, shard_mib=1),
            begun=_holds_a_finished_file,
            finished=Path.exists,
            outcome=contents,
        ),
    }


def _holds_a_finished_file(out: Path) -> bool:
    if not partial_path(out).is_dir():
        return False
    journal = survey(partial_path(out))
    return journal is not None and bool(journal.files)
