"""Put LoRA adapters on a model, and take them off it as PEFT names them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qlora_formats.adapter_config import AdapterConfig
from qlora_pipe.architecture import Architecture, matches
from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.nn.linear import LoraLinear, linear_modules, replace_module


def adaptable(model: nn.Module, architecture: Architecture) -> list[str]:
    """Paths of the linear layers that this family adapts, in the model's own order."""
    return [path for path in linear_modules(model) if matches(path, architecture.adapt)]


def add_adapters(model: nn.Module, paths: Sequence[str], config: AdapterConfig, *, dropout: float) -> None:
    """Wrap the linear layers at `paths`; A is drawn from torch's CPU generator in that order, B is zero."""
    linears = linear_modules(model)
    for path in paths:
        adapted = LoraLinear(linears[path], rank=config.r, scale=config.scale(path), dropout=dropout)
        adapted.reset()
        replace_module(model, path, adapted)


def describe_adapter(
    paths: Sequence[str], architecture: Architecture, *, rank: int, alpha: float, dropout: float
) -> AdapterConfig:
    """Describe a new adapter on the layers at `paths` as PEFT does; ConfigError where there are none."""
    if not paths:
        raise ConfigError(f"the plugin for {architecture.name} names no layer of this model to adapt.")
    return AdapterConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted({path.rpartition(".")[2] for path in paths}),
        task_type=architecture.task_type,
    )


def check_fit(pairs: Mapping[str, tuple[Tensor, Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise DataError naming the first pair (A [rank, in], B [out, rank]) that no layer of `shapes` [out, in] takes."""
    for path, (a, b) in pairs.items():
        if path not in shapes:
            raise DataError(f"the adapter does not fit this base: it adapts {path}, and the base has no such layer.")
        if shapes[path] != (b.shape[0], a.shape[1]):
            raise DataError(
                f"the adapter does not fit this base: for {path} it maps {a.shape[1]} to {b.shape[0]} features,"
                f" and the base's weight has shape {list(shapes[path])}."
            )


def attach_adapter(
    model: nn.Module, config: AdapterConfig, pairs: Mapping[str, tuple[Tensor, Tensor]], *, dropout: float = 0.0
) -> None:
    """Wrap linear layers with trained pairs (A [rank, in], B [out, rank]).

    Raises DataError naming the first layer that the model lacks or that has another shape, before anything is changed.
    """
    linears = linear_modules(model)
    check_fit(pairs, {path: (linear.out_features, linear.in_features) for path, linear in linears.items()})
    for path, (a, b) in pairs.items():
        adapted = LoraLinear(linears[path], rank=a.shape[0], scale=config.scale(path), dropout=dropout)
        with torch.no_grad():
            adapted.lora_a.copy_(a)
            adapted.lora_b.copy_(b)
        replace_module(model, path, adapted)


def adapters_of(model: nn.Module) -> dict[str, LoraLinear]:
    """Every adapted layer of a model by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def pairs_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters' A and B by the path of their layer, on the CPU, as an adapter file holds them."""
    return {
        path: (layer.lora_a.detach().float().cpu(), layer.lora_b.detach().float().cpu())
        for path, layer in adapters_of(model).items()
    }
