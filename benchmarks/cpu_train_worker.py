"""One side of cpu_train.py, in a process of its own: does a training step for each line it reads, and reports it.

Roles: `prepare` makes the store and the adapters' first values; `ours`, `peer` and `matmuls` are what is compared.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The 110M shape: what the figures of the comparison are quoted for.
SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 8192, "max_position_embeddings": 2048,
}  # fmt: skip
RANK, ALPHA, LEARNING_RATE, MAX_NORM = 16, 16.0, 2e-4, 0.3
DIFFERENT_BATCHES = 4
ADAPTERS = "adapters.pt"


class Task(NamedTuple):
    """What both sides compute."""

    work: Path
    dtype: torch.dtype
    batch: int
    tokens: int

    def ids(self, step: int) -> Tensor:
        """Ids [batch, tokens] of a step: a few batches that come again, of repeated pieces, so that it can learn."""
        draws = torch.Generator().manual_seed(step % DIFFERENT_BATCHES)
        piece = torch.randint(3, SHAPE["vocab_size"], (self.batch, 16), generator=draws)
        return piece.repeat(1, self.tokens // 16 + 1)[:, : self.tokens]


def prepare(task: Task) -> None:
    """Write the store, and the first values of all adapters."""
    from qlora_pipe.cli import execute
    from qlora_pipe.nn.adapt import pairs_of
    from qlora_pipe.testing import tiny_checkpoint

    tiny_checkpoint(task.work / "source", **SHAPE)
    if execute(["quantize", str(task.work / "source"), str(task.work / "store")]) != 0:
        sys.exit("the store could not be made")
    torch.save(pairs_of(_adapted(task)[0].module), task.work / ADAPTERS)


def _adapted(task: Task) -> tuple[Any, Any]:
    """Our model with new adapters, and the settings."""
    from qlora_pipe.artifacts import open_model
    from qlora_pipe.config import FinetuneConfig
    from qlora_pipe.plugins import find_architecture, load_plugins
    from qlora_pipe.stages.load import load
    from qlora_pipe.train.session import adapt

    config = FinetuneConfig(
        rank=RANK, alpha=ALPHA, learning_rate=LEARNING_RATE, max_grad_norm=MAX_NORM, dropout=0.0, recompute="none"
    )
    base = open_model(task.work / "store")
    family = find_architecture(load_plugins(), base.config["model_type"])
    torch.manual_seed(0)
    model = load(base, family, dtype=task.dtype, device=torch.device("cpu"))
    adapt(model, config, start=None)
    return model, config


def ours(task: Task) -> Callable[[int], dict[str, float]]:
    """The training loop of `finetune`, one step at a time, without its log and checkpoints."""
    from qlora_pipe.data.batches import IGNORE, Batch
    from qlora_pipe.train.blockwise import BlockwisePass
    from qlora_pipe.train.loop import Job, _update
    from qlora_pipe.train.recompute import RecomputePlan
    from qlora_pipe.train.session import new_state

    model, config = _adapted(task)
    model.module.train()
    state = new_state(model, config)
    passes = BlockwisePass(model, recompute=RecomputePlan(config.recompute))
    job = Job(
        model=model, state=state, config=config, passes=passes, train=[], held_out=[],
        check_stop=lambda: None, report=lambda _: None, save=lambda: None,
    )  # fmt: skip

    def step(number: int) -> dict[str, float]:
        ids = task.ids(number)
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
        trained = int((labels != IGNORE).sum())
        batch = Batch(ids=ids, labels=labels, tokens=ids.numel(), trained=trained, origins=())
        (loss,) = passes.run([batch], divisor=trained)
        state.progress.loss_sum = float(loss)
        norm = _update(job, rate=LEARNING_RATE, origins=())
        return {"loss": float(loss), "norm": norm or float("nan")}

    return step


def peer(task: Task) -> Callable[[int], dict[str, float]]:
    """transformers, peft and bitsandbytes on the same store, with the same adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(task.work / "store", dtype=task.dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = task.dtype
            module.weight.quant_state.dtype = task.dtype
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    pairs = torch.load(task.work / ADAPTERS, weights_only=True)
    with torch.no_grad():
        for path, (a, b) in pairs.items():
            layer = model.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0)
    model.train()

    def step(number: int) -> dict[str, float]:
        ids = task.ids(number)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss), "norm": float(norm)}

    return step


def matmuls(task: Task) -> Callable[[int], dict[str, float]]:
    """torch.mm for forward and dX of every base linear and the head: what no QLoRA step can do without."""
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    layer = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    shapes = layer * SHAPE["num_hidden_layers"] + [(SHAPE["vocab_size"], hidden)]
    tokens = task.batch * task.tokens
    weights = {shape: torch.randn(shape).to(task.dtype) for shape in set(shapes)}
    rows = {size: torch.randn(tokens, size).to(task.dtype) for size in {size for shape in shapes for size in shape}}
    results = {size: torch.empty_like(row) for size, row in rows.items()}

    def step(_: int) -> dict[str, float]:
        for outputs, inputs in shapes:
            torch.mm(rows[inputs], weights[outputs, inputs].T, out=results[outputs])
        for outputs, inputs in reversed(shapes):
            torch.mm(rows[outputs], weights[outputs, inputs], out=results[inputs])
        return {}

    return step


def main() -> None:
    role, work, dtype, threads, batch, tokens = sys.argv[1:]
    torch.set_num_threads(int(threads))
    task = Task(Path(work), getattr(torch, dtype), int(batch), int(tokens))
    if role == "prepare":
        return prepare(task)
    step = {"ours": ours, "peer": peer, "matmuls": matmuls}[role](task)
    print("ready", flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        found = step(int(line))
        found |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        found["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found), flush=True)
    return None


if __name__ == "__main__":
    main()
