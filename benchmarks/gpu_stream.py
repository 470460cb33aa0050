"""Training with the base's weights on the GPU against passing through it: `python benchmarks/gpu_stream.py`.

Stores of the shapes of LLaMA 65B and LLaMA 2 70B, 4 bits with double quantisation and random bytes; those of all 80
layers are files with holes, whose codes, embedding and head become random once they are in memory. A step is a forward
pass, a backward pass in which every block is computed again, and an update by AdamW. Each row is a process of its own.
"peak GB" is torch's own count, "used GB" what the driver says at the end, the CUDA context included; "host GB" is the
memory that the driver holds for the weights. Of one shape and number of tokens the first losses of all rows must be the
same to the last bit; attention's backward pass adds up in no fixed order, so later ones may differ there.

--quick takes the 70B shape with a tenth of its layers, and one step of the whole one, streamed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import gpu
import torch
from hollow import SHAPES, Content, hollow_store
from report import publish

from qlora_pipe.nn.linear import QuantizedLinear
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.residency.ring import Ring

_GB = 1e9
_LAYERS = 80
_FEW_LAYERS = 8


class Task(NamedTuple):
    """One row: what is trained, and how."""

    shape: str
    layers: int
    residency: str
    batch: int
    tokens: int
    """Of one sample."""
    rank: int
    steps: int
    """Timed ones; one goes before."""

    @property
    def content(self) -> Content:
        """What the store's files hold: a whole model's random bytes would take too much of a disk."""
        return "tables" if self.layers == _LAYERS else "noise"

    @property
    def work(self) -> tuple[str, int, int, int, int]:
        """What must give the same losses wherever the weights live."""
        return self.shape, self.layers, self.batch, self.tokens, self.rank


def tasks(*, quick: bool) -> list[Task]:
    """The rows to measure, the most telling first."""
    few = [Task("2-70B", _FEW_LAYERS, residency, 4, 2048, 16, 3) for residency in ("resident", "streamed", "mapped")]
    if quick:
        return [*few, Task("2-70B", _LAYERS, "streamed", 1, 512, 16, 1)]
    whole = [
        Task("2-70B", _LAYERS, residency, batch, 2048, 16, 2)
        for batch in (4, 2)
        for residency in ("resident", "streamed")
    ]
    # The paper's own line: 65B at batch 1, 512 tokens.
    paper = [
        Task(shape, _LAYERS, residency, 1, 512, rank, 2)
        for shape, rank in (("65B", 64), ("65B", 16), ("2-70B", 16))
        for residency in ("resident", "streamed")
    ]
    return [*few, *whole, *paper]


def measure(task: Task, folder: Path, *, device: str = "cuda") -> dict[str, Any]:
    """Load the store at `folder` and train a few steps on random ids."""
    from qlora_pipe.artifacts import open_model
    from qlora_pipe.config import FinetuneConfig
    from qlora_pipe.data.batches import Batch
    from qlora_pipe.plugins import find_architecture, load_plugins
    from qlora_pipe.stages.load import load
    from qlora_pipe.train.blockwise import BlockwisePass
    from qlora_pipe.train.recompute import RecomputePlan
    from qlora_pipe.train.session import adapt, new_state

    gpu.forget_peaks()
    base = open_model(folder)
    architecture = find_architecture(load_plugins(), base.config["model_type"])
    begun = time.perf_counter()
    model = load(
        base,
        architecture,
        dtype=torch.bfloat16,
        device=torch.device(device),
        residency=task.residency,  # type: ignore[arg-type]
        note=lambda sentence: print(sentence, file=sys.stderr),
    )
    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - begun
    if task.content == "tables":
        fill_with_noise(model)
    # A model that does not stay on the GPU leaves its optimizer's moments to the host as well.
    budget: Any = 0 if task.residency == "streamed" else "auto"
    config = FinetuneConfig(rank=task.rank, dropout=0.0, optimizer_budget=budget)
    torch.manual_seed(0)
    adapt(model, config, start=None)
    state = new_state(model, config, scratch=folder / "moments")
    whole = torch.ones((), device=device)
    model.module.train()
    passes = BlockwisePass(model, recompute=RecomputePlan("all"))
    ids = torch.randint(0, SHAPES[task.shape].vocabulary, (task.batch, task.tokens + 1))
    batch = Batch(
        ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        tokens=task.batch * task.tokens,
        trained=task.batch * task.tokens,
        origins=(),
    )
    seconds, losses = [], []
    for number in range(task.steps + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        (loss,) = passes.run([batch], divisor=float(batch.trained))
        state.optimizer.step(lr=config.learning_rate, number=number + 1, factor=whole)
        state.optimizer.zero_grad()
        torch.cuda.synchronize()
        losses.append(float(loss))
        if number:
            seconds.append(time.perf_counter() - begun)
    peak = gpu.peaks()
    free, total = torch.cuda.mem_get_info()
    ring = model.residency if isinstance(model.residency, Ring) else None
    return {
        "seconds": statistics.median(seconds),
        "losses": losses,
        "peak": peak.allocated,
        "used": total - free,
        "host": held_bytes(model),
        "load": load_seconds,
        "blocks a step": ring.blocks_brought / len(losses) if ring else 0,
    }


def held_bytes(model: LoadedModel) -> int:
    """Host memory that the driver holds for a model's weights."""
    return sum(held.bytes.numel() for held in getattr(model.residency, "held", ()) if held is not None)


def fill_with_noise(model: LoadedModel) -> None:
    """Random codes for every block, the same for all, where the weights live; random embedding and head.

    A store of holes is quickly made, but products of equal numbers cost a GPU less power than those of a real model's.
    """
    draws = torch.Generator(model.device).manual_seed(1)
    for parameter in model.module.parameters():
        # Matrices outside of blocks, and no norms.
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.02, generator=draws)
    blocks = [[part for part in block.modules() if isinstance(part, QuantizedLinear)] for block in model.causal.blocks]
    noise = [torch.randint(0, 256, part.codes.shape, dtype=torch.uint8) for part in blocks[0]]
    ring = model.residency if isinstance(model.residency, Ring) else None
    for number, parts in enumerate(blocks):
        for part, values in zip(parts, noise, strict=True):
            if ring is None:
                part.codes.copy_(values)
            elif (held := ring.held[number]) is not None:
                start = part.codes.storage_offset()
                held.bytes[start : start + values.numel()] = values


def run(task: Task, folder: Path) -> dict[str, Any] | str:
    """Measure in a process of its own; a sentence where it failed."""
    words = [sys.executable, __file__, "--measure", json.dumps(task), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it was killed"])[-1][:100]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(task: Task, found: dict[str, Any] | str, resident: dict[str, Any] | None) -> dict[str, object]:
    """A line of the table; `resident` is the same work with the weights on the GPU, where that was measured."""
    shown: dict[str, object] = {
        "model": f"LLaMA {task.shape}" + (f", {task.layers} layers" if task.layers < _LAYERS else ""),
        "weights": task.residency,
        "rank": task.rank,
        "tokens/step": task.batch * task.tokens,
    }
    names = ("tokens/s", "of resident", "s/step", "peak GB", "used GB", "host GB", "load s", "blocks/step", "loss")
    if isinstance(found, str):
        return shown | dict.fromkeys(names, "") | {"loss": found}
    equal = resident is None or found["losses"][0] == resident["losses"][0]
    values = (
        round(task.batch * task.tokens / found["seconds"], 1),
        round(resident["seconds"] / found["seconds"], 3) if resident else "",
        round(found["seconds"], 3),
        round(found["peak"] / _GB, 2),
        round(found["used"] / _GB, 2),
        round(found["host"] / _GB, 2),
        round(found["load"], 2),
        found["blocks a step"],
        f"{found['losses'][0]:.6f} {found['losses'][-1]:.6f}" + ("" if equal else " DIFFERS"),
    )
    return shown | dict(zip(names, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few layers, and one step of the whole model")
    parser.add_argument(
        "--folder", type=Path, help="where the stores are made (default: the system's temporary folder)"
    )
    parser.add_argument("--measure", nargs=2, metavar=("TASK", "STORE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    gpu.require_gpu()
    if arguments.measure:
        print(json.dumps(measure(Task(*json.loads(arguments.measure[0])), Path(arguments.measure[1]))))
        return
    rows, resident = [], {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        for task in tasks(quick=arguments.quick):
            shape = SHAPES[task.shape]._replace(layers=task.layers)
            folder = Path(scratch) / f"{task.shape}-{task.layers}"
            if not folder.exists():
                hollow_store(folder, shape, shard_mib=4096, content=task.content)
            found = run(task, folder)
            if task.residency == "resident" and not isinstance(found, str):
                resident[task.work] = found
            rows.append(row(task, found, resident.get(task.work)))
            # What there is so far stands, whatever becomes of the rest.
            publish("gpu_stream", rows=rows, peers=())


if __name__ == "__main__":
    main()
