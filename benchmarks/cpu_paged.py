"""Optimizer steps with and without pages on a CPU, against torch's and bitsandbytes': `python benchmarks/cpu_paged.py`.

The parameters are rank-64 adapters of some layers of a 7B LLaMA, gradients random. "paged" holds one page in memory and
the rest in a mapped file on the disk named. Before anything is timed, pages are seen to change no bit, and moments in
32 bits to be torch's.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import optim as peers
from report import interleaved, publish
from torch import nn

from qlora_pipe.optim.paged_adamw import PagedAdamW
from qlora_pipe.optim.storage import storage_for

_SIDES = ((4096, 64), (64, 4096)) * 4 + ((64, 4096), (11008, 64)) * 2 + ((64, 11008), (4096, 64))
_RATE = 2e-4
_SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01}


def _parameters(layers: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{layer}.{number}": nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        for layer in range(layers)
        for number, shape in enumerate(_SIDES)
    }


def _fill(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.normal_(std=1e-3, generator=generator)


class Ours:
    """Our optimizer, counting its updates."""

    def __init__(self, layers: int, *, bits: Any, budget: Any, folder: Path) -> None:
        self.parameters = _parameters(layers)
        storage = storage_for(torch.device("cpu"), budget=budget, scratch=folder / "states")
        self.optimizer = PagedAdamW(self.parameters, bits=bits, storage=storage, **_SETTINGS)
        self.number = 0
        _fill(self.parameters, 0)

    def step(self) -> None:
        self.number += 1
        self.moved = self.optimizer.step(lr=_RATE, number=self.number, factor=torch.ones(()))


class Theirs:
    """Another optimizer over parameters of its own."""

    def __init__(self, layers: int, make: Callable[..., Any]) -> None:
        self.parameters = _parameters(layers)
        self._optimizer = make(self.parameters.values(), lr=_RATE, **_SETTINGS)
        _fill(self.parameters, 0)

    def step(self) -> None:
        self._optimizer.step()


def _check_identity(folder: Path) -> None:
    torchs = Theirs(1, functools.partial(torch.optim.AdamW, foreach=False, fused=False))
    groups = {32: [torchs], 8: []}
    for bits, budget in ((32, "auto"), (32, 0), (8, "auto"), (8, 0)):
        groups[bits].append(Ours(1, bits=bits, budget=budget, folder=folder))
    for group in groups.values():
        for number in range(3):
            for one in group:
                _fill(one.parameters, number)
                one.step()
        for name, parameter in group[0].parameters.items():
            assert all(torch.equal(parameter, one.parameters[name]) for one in group[1:]), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--layers", type=int, default=4, help="layers whose adapters are trained (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed updates of each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the file lies (default: a temporary folder)")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        _check_identity(folder)
        for threads in sorted({1, torch.get_num_threads()}):
            torch.set_num_threads(threads)
            for bits in (32, 8):
                ours = {
                    which: Ours(arguments.layers, bits=bits, budget=budget, folder=folder)
                    for which, budget in (("resident", "auto"), ("paged", 0))
                }
                peer = (
                    functools.partial(torch.optim.AdamW, foreach=False, fused=False) if bits == 32 else peers.AdamW8bit
                )
                theirs = Theirs(arguments.layers, peer)
                timings = interleaved(
                    {**{which: one.step for which, one in ours.items()}, "peer": theirs.step}, rounds=arguments.rounds
                )
                optimizer, moved = ours["paged"].optimizer, ours["paged"].moved
                rows.append(
                    {
                        "bits": bits,
                        "threads": threads,
                        "peer": "torch" if bits == 32 else "bitsandbytes",
                        "states MB": round(optimizer.state_bytes / 1e6, 1),
                        "resident %": round(100 * optimizer.resident_bytes / optimizer.state_bytes, 2),
                        "pages in": moved.pages_in,
                        "MB moved": round((moved.bytes_in + moved.bytes_out) / 1e6),
                        **{f"{which} ms": round(timing.wall * 1e3, 1) for which, timing in timings.items()},
                        **{f"{which} CPU ms": round(timing.cpu * 1e3, 1) for which, timing in timings.items()},
                        "paged/resident": round(timings["paged"].wall / timings["resident"].wall, 2),
                        "resident/peer": round(timings["resident"].wall / timings["peer"].wall, 2),
                    }
                )
    publish("cpu_paged", rows=rows, peers=["bitsandbytes"])


if __name__ == "__main__":
    main()
