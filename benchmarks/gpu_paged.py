"""Optimizer steps with and without pages on a GPU, against torch's and bitsandbytes': `python benchmarks/gpu_paged.py`.

The parameters are rank-64 adapters of every linear layer of a LLaMA, gradients random. A candidate does whole updates
of all of them; "paged" keeps at most 5 % of its states on the GPU, bitsandbytes' paged optimizers keep what the driver
leaves there. Before anything is timed, paged and resident updates of ours are compared to the last bit.

"step" is what one training step of so many tokens would take in place of the resident one: the time of the update, and
that of the base's matrix products alone, forward and towards the inputs, at the speed measured here.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gpu
import torch
from report import publish
from torch import Tensor, nn

from qlora_pipe.optim.lanes import CudaLanes
from qlora_pipe.optim.paged_adamw import PagedAdamW
from qlora_pipe.optim.pager import Moved
from qlora_pipe.optim.storage import Storage, pinned_pages

_RANK = 64
_SHARE = 0.05
_SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.0}
_RATE = 2e-4


class Model(NamedTuple):
    """A LLaMA's sizes."""

    name: str
    hidden: int
    inner: int
    layers: int

    @property
    def weights(self) -> int:
        """Weights of the linear layers."""
        return self.layers * (4 * self.hidden * self.hidden + 3 * self.hidden * self.inner)

    def adapters(self) -> dict[str, nn.Parameter]:
        """Random adapters, with gradients."""
        shapes = {}
        for layer in range(self.layers):
            sides = dict.fromkeys("qkvo", (self.hidden, self.hidden))
            sides |= dict.fromkeys(("gate", "up"), (self.hidden, self.inner)) | {"down": (self.inner, self.hidden)}
            for name, (inputs, outputs) in sides.items():
                shapes[f"{layer}.{name}.a"] = (_RANK, inputs)
                shapes[f"{layer}.{name}.b"] = (outputs, _RANK)
        return {name: nn.Parameter(torch.randn(shape, device="cuda") * 0.02) for name, shape in shapes.items()}


_MODELS = (
    Model("7B", 4096, 11008, 32),
    Model("13B", 5120, 13824, 40),
    Model("33B", 6656, 17920, 60),
    Model("65B", 8192, 22016, 80),
)


class Ours:
    """Our optimizer, and what its last update moved."""

    def __init__(self, parameters: dict[str, nn.Parameter], *, bits: Any, paged: bool) -> None:
        storage = Storage(
            lanes=CudaLanes(torch.device("cuda")),
            backing=pinned_pages,
            budget=lambda: int(self.optimizer.state_bytes * _SHARE) if paged else None,
        )
        self.optimizer = PagedAdamW(parameters, bits=bits, storage=storage, **_SETTINGS)
        self.moved = Moved()
        self._one = torch.ones((), device="cuda")

    def __call__(self, number: int) -> None:
        self.moved = self.optimizer.step(lr=_RATE, number=number + 1, factor=self._one)


def _fill(parameters: dict[str, nn.Parameter], generator: torch.Generator) -> None:
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.normal_(std=1e-3, generator=generator)


def _check_identity(model: Model, *, bits: int) -> None:
    """Three updates of ours, resident and paged, give the same parameters and states."""
    found: list[list[Tensor]] = []
    for paged in (False, True):
        torch.manual_seed(0)
        parameters = model.adapters()
        ours = Ours(parameters, bits=bits, paged=paged)
        for number in range(3):
            _fill(parameters, torch.Generator("cuda").manual_seed(number))
            ours(number)
        assert (ours.moved.pages_in > 0) == paged
        states = [state for name in list(parameters)[:40] for _, state in ours.optimizer.saved(name)]
        found.append([parameter.detach().cpu() for parameter in parameters.values()] + states)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)), f"pages change bits ({bits} bits)"


def _candidates(model: Model, *, bits: int) -> dict[str, Callable[[int], object]]:
    from bitsandbytes import optim as peers

    generator = torch.Generator("cuda").manual_seed(1)
    shared, resident, paged = (model.adapters() for _ in range(3))
    ours = {
        "ours resident": Ours(resident, bits=bits, paged=False), "ours paged": Ours(paged, bits=bits, paged=True)
    }  # fmt: skip
    for parameters in (shared, resident, paged):
        _fill(parameters, generator)
    # The others work on the same parameters, each with its own states.
    if bits == 32:
        theirs = {
            "torch": torch.optim.AdamW(shared.values(), lr=_RATE, foreach=False, fused=False, **_SETTINGS),
            "torch fused": torch.optim.AdamW(shared.values(), lr=_RATE, fused=True, **_SETTINGS),
            "bitsandbytes paged": peers.PagedAdamW32bit(shared.values(), lr=_RATE, **_SETTINGS),
        }
    else:
        theirs = {
            "bitsandbytes": peers.AdamW8bit(shared.values(), lr=_RATE, **_SETTINGS),
            "bitsandbytes paged": peers.PagedAdamW8bit(shared.values(), lr=_RATE, **_SETTINGS),
        }

    def stepping(optimizer: Any, _: int) -> None:
        optimizer.step()

    return ours | {name: functools.partial(stepping, optimizer) for name, optimizer in theirs.items()}


def _row(model: Model, *, bits: int, rounds: int, tokens: int, ceilings: gpu.Ceilings) -> dict[str, object]:
    gpu.forget_peaks()
    candidates = _candidates(model, bits=bits)
    timings = gpu.interleaved(candidates, rounds=rounds)
    paged = candidates["ours paged"]
    assert isinstance(paged, Ours)
    products = 4 * model.weights * tokens / ceilings.matmul_tflop_per_s / 1e12
    here, there = timings["ours resident"].seconds, timings["ours paged"].seconds
    row: dict[str, object] = {"model": model.name, "bits": bits, "states MB": round(paged.optimizer.state_bytes / 1e6)}
    row["resident %"] = round(100 * paged.optimizer.resident_bytes / paged.optimizer.state_bytes, 2)
    row |= {"pages in": paged.moved.pages_in, "MB moved": round((paged.moved.bytes_in + paged.moved.bytes_out) / 1e6)}
    for name in ("torch", "torch fused", "bitsandbytes", "bitsandbytes paged", "ours resident", "ours paged"):
        row[f"{name} ms"] = round(timings[name].seconds * 1e3, 3) if name in timings else "-"
    row["paged GB/s each way"] = round(paged.moved.bytes_in / there / 1e9, 1)
    row["to device GB/s"] = round(ceilings.to_device_gb_per_s, 1)
    row["peer paged/ours paged"] = round(timings["bitsandbytes paged"].seconds / there, 2)
    row["step, paged/resident"] = round((products + there) / (products + here), 3)
    row["pinned MB"] = round(gpu.peaks().pinned / 1e6)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two models and few rounds")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a training step (default: %(default)s)")
    arguments = parser.parse_args()
    gpu.require_gpu()
    ceilings = gpu.ceilings()
    models, rounds = (_MODELS[:1] + _MODELS[-1:], 5) if arguments.quick else (_MODELS, 15)
    rows = []
    for bits in (32, 8):
        _check_identity(_MODELS[0], bits=bits)
        for model in models:
            rows.append(_row(model, bits=bits, rounds=rounds, tokens=arguments.tokens, ceilings=ceilings))
            torch.cuda.empty_cache()
    publish("gpu_paged", rows=rows, peers=["triton", "bitsandbytes"])


if __name__ == "__main__":
    main()
