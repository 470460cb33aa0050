"""Adapters made for a test, for the layers of a tiny checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qlora_formats.adapter import write_adapter
from qlora_formats.adapter_config import AdapterConfig
from qlora_formats.commit import commit_folder

DOWN = "model.layers.0.mlp.down_proj"
GATE = "model.layers.1.mlp.gate_proj"


def make_adapter(folder: Path, sizes: Mapping[str, float], *, shape: tuple[int, int] = (32, 72)) -> Path:
    """Write an adapter of rank 2 and scale 1 whose product has elements of about this size, per module path.

    `shape` is [out, in] of every path that names a down_proj, and the other way round of every other one.
    """

    def pair(path: str, size: float) -> tuple[Tensor, Tensor]:
        out, into = shape if path.endswith("down_proj") else shape[::-1]
        draws = torch.Generator().manual_seed(len(path))
        return torch.randn(2, into, generator=draws), size * torch.randn(out, 2, generator=draws)

    return save_adapter(folder, {path: pair(path, size) for path, size in sizes.items()})


def save_adapter(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Path:
    """Write an adapter of scale 1: A [rank, in] and B [out, rank] per module path."""
    rank = len(next(iter(pairs.values()))[0])
    modules = sorted({path.rpartition(".")[2] for path in pairs})
    with commit_folder(folder, kind="adapter", inputs={}) as work:
        config = AdapterConfig(r=rank, lora_alpha=float(rank), target_modules=modules)
        write_adapter(work, config=config, pairs=pairs, metadata={})
        work.finish()
    return folder
