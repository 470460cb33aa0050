"""The demo: the whole chain on the embedded model, with every figure computed on the way."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pluggy
import torch

from qlora_formats.commit import write_file
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint, Run, open_model
from qlora_pipe.config import FinetuneConfig, GenerateConfig, MergeConfig, QuantizeConfig
from qlora_pipe.data.order import held_out_order
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture
from qlora_pipe.stages.finetune import finetune
from qlora_pipe.stages.generate import answer
from qlora_pipe.stages.load import load
from qlora_pipe.stages.merge import merge
from qlora_pipe.stages.quantize import quantize
from qlora_pipe.train.request import FinetuneRequest

HELD_OUT_ROWS = 64
STEPS = 160
_CPU = torch.device("cpu")


def demo_base() -> Path:
    """The folder of the embedded model."""
    with as_file(files("qlora_pipe.demo") / "base") as folder:
        return Path(folder)


def skill_rows() -> list[dict[str, str]]:
    """The rows of the bundled dataset, prompt and answer each."""
    text = (files("qlora_pipe.demo") / "skill.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def finetune_config(*, seed: int, eval_data: str) -> FinetuneConfig:
    """The recipe that suits a model this small: a higher rate and fewer steps than the paper's."""
    return FinetuneConfig(
        steps=STEPS, batch_size=16, learning_rate=2e-3, rank=16, alpha=16.0, dropout=0.0, max_grad_norm=1.0,
        max_tokens=128, eval_data=eval_data, save_every=100, seed=seed, device="cpu",
    )  # fmt: skip


@dataclass(frozen=True)
class _Split:
    train: Path
    held_out: Path
    rows: list[dict[str, str]]


def run_demo(
    out: Path, *, seed: int, manager: pluggy.PluginManager, note: Callable[[str], None] = lambda _: None
) -> Iterator[str]:
    """Yield the demo's lines as its steps end; everything it makes lies under `out`, by seed.

    Called again it finds what is made and only measures again. Raises what the stages raise.
    """
    begun = time.monotonic()
    base = Checkpoint.open(demo_base())
    parameters = sum(base.weights.tensor(name).numel() for name in base.weights.names)
    layers = base.config["num_hidden_layers"]
    yield f"1/6 base      tiny-llama, {layers} layers, {parameters / 1e6:.2f} M parameters, made by this project"

    done = quantize(base, out / "store", QuantizeConfig(), manager=manager)
    bits = _bits_per_weight(out / "store")
    totals = done.manifest.fields["totals"]
    yield (
        f"2/6 quantize  NF4 + double quantization   {totals['source_bytes'] / 1e6:.2f} MB ->"
        f" {totals['bytes'] / 1e6:.2f} MB ({bits:.2f} bits per quantised weight)"
    )

    split = _split(out / f"data-seed-{seed}", seed=seed)
    trained = len(skill_rows()) - len(split.rows)
    yield f"3/6 data      bundled questions and answers, {trained} rows to train, {len(split.rows)} held out"

    runs: dict[str, Run] = {}
    for name, folder in (("16-bit LoRA", demo_base()), ("NF4 QLoRA", out / "store")):
        request = FinetuneRequest(
            base=str(folder),
            data=f"jsonl:{split.train}",
            out=out / f"{name.split()[1].lower()}-seed-{seed}",
            config=finetune_config(seed=seed, eval_data=f"jsonl:{split.held_out}"),
        )
        runs[name] = finetune(request, manager=manager, note=note)
        yield f"4/6 finetune  {name:11}  {_story(runs[name])}"

    merged = out / f"merged-seed-{seed}"
    result = merge(
        open_model(out / "store"), Adapter.open(runs["NF4 QLoRA"].path), merged, MergeConfig(dtype="float32"),
        manager=manager, note=note,
    )  # fmt: skip
    models = {
        "base": _load(manager, demo_base()),
        "16-bit LoRA": _load(manager, demo_base(), runs["16-bit LoRA"].path),
        "NF4 QLoRA": _load(manager, out / "store", runs["NF4 QLoRA"].path),
        "NF4 merged": _load(manager, merged),
    }
    tokenizer = Tokenizer.open(demo_base())
    gap = _logit_gap(models["NF4 QLoRA"], models["NF4 merged"], tokenizer, split.rows)
    yield f"5/6 merge     dequant(NF4) + LoRA, max |dlogit| against the adapter {gap:.1e}  ({result.summary})"

    answers = {name: _answers(model, tokenizer, split.rows) for name, model in models.items()}
    right = {name: _count_right(found, split.rows) for name, found in answers.items()}
    scores = ", ".join(f"{name} {count}/{len(split.rows)}" for name, count in right.items())
    yield f"6/6 compare   held-out answers right: {scores}"
    row = split.rows[0]
    yield f"    example   {row['prompt']}"
    yield f"              base:{answers['base'][0].splitlines()[0] if answers['base'][0] else ''!r}"
    yield f"              fine-tuned:{answers['NF4 QLoRA'][0]!r}   right:{row['answer']!r}"
    yield f"{time.monotonic() - begun:.0f} seconds. Try it: {_try_it(out, runs['NF4 QLoRA'], row)}"


def _split(folder: Path, *, seed: int) -> _Split:
    """Draw the held-out rows by the seed and write both parts."""
    rows = skill_rows()
    held_out = sorted(held_out_order(len(rows), seed=seed)[:HELD_OUT_ROWS].tolist())
    parts = {
        "held-out": [rows[index] for index in held_out],
        "train": [row for index, row in enumerate(rows) if index not in set(held_out)],
    }
    for name, part in parts.items():
        write_file(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part).encode())
    return _Split(folder / "train.jsonl", folder / "held-out.jsonl", parts["held-out"])


def _story(run: Run) -> str:
    """What the metrics say of a run."""
    steps = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    seconds, tokens = sum(step["seconds"] for step in steps), sum(step["tokens"] for step in steps)
    return (
        f"{len(steps)} steps  loss {steps[0]['loss']:.2f} -> {steps[-1]['loss']:.2f}"
        f"  held-out {steps[0]['eval_loss_start']:.2f} -> {steps[-1]['eval_loss']:.2f}  {tokens / seconds:,.0f} tok/s"
    )


def _bits_per_weight(store: Path) -> float:
    weights = QuantizedCheckpoint.open(store).weights
    packed = [name for name in weights.names if weights.is_quantized(name)]
    sizes = [torch.Size(weights.shape(name)).numel() for name in packed]
    return sum(weights.bits(name) * size for name, size in zip(packed, sizes, strict=True)) / sum(sizes)


def _load(manager: pluggy.PluginManager, folder: Path, adapter: Path | None = None) -> LoadedModel:
    model = open_model(folder)
    architecture = find_architecture(manager, model.config.get("model_type"))
    return load(
        model, architecture, dtype=torch.float32, device=_CPU, adapter=Adapter.open(adapter) if adapter else None
    )


@torch.inference_mode()
def _logit_gap(one: LoadedModel, other: LoadedModel, tokenizer: Tokenizer, rows: Sequence[Mapping[str, str]]) -> float:
    gaps = []
    for row in rows:
        ids = torch.tensor([[tokenizer.bos_id or 0, *tokenizer.encode(row["prompt"])[0]]])
        logits = [model.causal.head(model.causal.hidden(ids)) for model in (one, other)]
        gaps.append(float((logits[0] - logits[1]).abs().max()))
    return max(gaps)


def _answers(model: LoadedModel, tokenizer: Tokenizer, rows: Sequence[Mapping[str, str]]) -> list[str]:
    config = GenerateConfig(max_new_tokens=12)
    return ["".join(answer(model, tokenizer, row["prompt"], config)) for row in rows]


def _count_right(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(found.strip() == row["answer"].strip() for found, row in zip(answers, rows, strict=True))


def _try_it(out: Path, run: Run, row: Mapping[str, str]) -> str:
    program = sys.argv[0] if Path(sys.argv[0]).name == "qlora-pipe" else "python -m qlora_pipe"
    return f'{program} generate {out / "store"} --adapter {run.path} --prompt "{row["prompt"]}"'
