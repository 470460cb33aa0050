"""One side of cpu_train.py or gpu_train.py, in a process of its own: a training step for each line it reads.

Roles: `prepare` makes the adapters' first values; `ours`, `peer` and `matmuls` are what is compared.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

RANK, ALPHA, LEARNING_RATE, MAX_NORM = 16, 16.0, 2e-4, 0.3
DIFFERENT_BATCHES = 4
ADAPTERS = "adapters.pt"


class Task(NamedTuple):
    """What both sides compute, as the command line gives it."""

    work: Path
    """Holds `store`; the adapters' first values are put beside it."""
    dtype: torch.dtype
    device: torch.device
    threads: int
    batch: int
    tokens: int
    recompute: str

    def ids(self, step: int) -> Tensor:
        """Ids [batch, tokens] of a step: a few batches that come again, of repeated pieces, so that it can learn."""
        draws = torch.Generator().manual_seed(step % DIFFERENT_BATCHES)
        piece = torch.randint(3, self.config["vocab_size"], (self.batch, 16), generator=draws)
        return piece.repeat(1, self.tokens // 16 + 1)[:, : self.tokens]

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        found: dict[str, Any] = json.loads((self.work / "store" / "config.json").read_text())
        return found

    def words(self, role: str) -> list[str]:
        """The command line of a worker."""
        dtype = str(self.dtype).removeprefix("torch.")
        numbers = (self.threads, self.batch, self.tokens)
        return [
            sys.executable,
            __file__,
            role,
            str(self.work),
            dtype,
            str(self.device),
            *map(str, numbers),
            self.recompute,
        ]


class Side:
    """One worker, from outside: a process that does a step when asked."""

    def __init__(self, role: str, task: Task, *, environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            task.words(role), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._line() != "ready":
            sys.exit(f"{role} did not start")

    def step(self, number: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def prepare(task: Task) -> None:
    """Write the adapters' first values."""
    from qlora_pipe.nn.adapt import pairs_of

    torch.save(pairs_of(_adapted(task)[0].module), task.work / ADAPTERS)


def _adapted(task: Task) -> tuple[Any, Any]:
    """Our model with new adapters, and the settings."""
    from qlora_pipe.artifacts import open_model
    from qlora_pipe.config import FinetuneConfig
    from qlora_pipe.plugins import find_architecture, load_plugins
    from qlora_pipe.stages.load import load
    from qlora_pipe.train.session import adapt

    config = FinetuneConfig(
        rank=RANK,
        alpha=ALPHA,
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_NORM,
        dropout=0.0,
        recompute=task.recompute,
    )
    base = open_model(task.work / "store")
    family = find_architecture(load_plugins(), base.config["model_type"])
    torch.manual_seed(0)
    model = load(base, family, dtype=task.dtype, device=task.device)
    adapt(model, config, start=None)
    return model, config


def ours(task: Task) -> Callable[[int], dict[str, float]]:
    """The training loop of `finetune`, one step at a time, without its log and checkpoints."""
    from qlora_pipe.data.batches import IGNORE, Batch, Stream
    from qlora_pipe.train.blockwise import BlockwisePass
    from qlora_pipe.train.loop import Job, update
    from qlora_pipe.train.memory import keep_freed_memory
    from qlora_pipe.train.recompute import RecomputePlan
    from qlora_pipe.train.session import new_state

    if task.device.type == "cpu":
        # As `finetune` does.
        keep_freed_memory()
    model, config = _adapted(task)
    model.module.train()
    state = new_state(model, config, scratch=task.work / "moments")
    passes = BlockwisePass(model, recompute=RecomputePlan(config.recompute))
    job = Job(
        model=model, state=state, config=config, passes=passes, stream=Stream([], seed=0), held_out=[],
        check_stop=lambda: None, report=lambda _: None, save=lambda: None,
    )  # fmt: skip

    def step(number: int) -> dict[str, float]:
        ids = task.ids(number)
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
        trained = int((labels != IGNORE).sum())
        batch = Batch(ids=ids, labels=labels, tokens=ids.numel(), trained=trained, origins=())
        (loss,) = passes.run([batch], divisor=trained)
        state.progress.loss_sum = 0.0
        norm, _ = update(job, [loss], rate=LEARNING_RATE, origins=())
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
    if task.recompute == "all":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()

    def step(number: int) -> dict[str, float]:
        ids = task.ids(number).to(task.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach()), "norm": float(norm)}

    return step


def matmuls(task: Task) -> Callable[[int], dict[str, float]]:
    """torch.mm for forward and dX of every base linear and the head: what no QLoRA step can do without."""
    config = task.config
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = [(hidden, hidden)] * 2 + [(key_value, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    shapes = layer * config["num_hidden_layers"] + [(config["vocab_size"], hidden)]
    tokens = task.batch * task.tokens

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=task.dtype, device=task.device)

    weights = {shape: random(*shape) for shape in set(shapes)}
    rows = {size: random(tokens, size) for size in {size for shape in shapes for size in shape}}
    results = {size: torch.empty_like(row) for size, row in rows.items()}

    def step(_: int) -> dict[str, float]:
        for outputs, inputs in shapes:
            torch.mm(rows[inputs], weights[outputs, inputs].T, out=results[outputs])
        for outputs, inputs in reversed(shapes):
            torch.mm(rows[outputs], weights[outputs, inputs], out=results[inputs])
        return {}

    return step


def main() -> None:
    role, work, dtype, device, threads, batch, tokens, recompute = sys.argv[1:]
    numbers = map(int, (threads, batch, tokens))
    task = Task(Path(work), getattr(torch, dtype), torch.device(device), *numbers, recompute)
    torch.set_num_threads(task.threads)
    if role == "prepare":
        return prepare(task)
    step = {"ours": ours, "peer": peer, "matmuls": matmuls}[role](task)
    on_gpu = task.device.type == "cuda"
    print("ready", flush=True)
    for line in sys.stdin:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        wall, cpu = time.perf_counter(), time.process_time()
        found = step(int(line))
        if on_gpu:
            torch.cuda.synchronize()
        found |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        found["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if on_gpu:
            found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            found["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
        print(json.dumps(found), flush=True)
    return None


if __name__ == "__main__":
    main()
