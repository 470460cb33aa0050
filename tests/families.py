"""Tiny checkpoints of the families beside LLaMA: whole, deterministic, and large enough in each part to show."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_pipe.architecture import Architecture
from qlora_pipe.testing import byte_tokenizer
from qlora_plugins import mistral, qwen2, qwen3

FAMILIES: Mapping[str, ModuleType] = {"mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}


def architecture_of(family: str) -> Architecture:
    """What the family's plugin says of it."""
    (found,) = FAMILIES[family].register_architectures()
    assert isinstance(found, Architecture)
    return found


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """The family's small config.json with some fields replaced or added; None stays, as null."""
    return {**FAMILIES[family].TINY, **overrides}


def drawn_weights(family: str, config: Mapping[str, Any], *, seed: int) -> dict[str, Tensor]:
    """Draw the weights of a checkpoint with this config, float32; a tied head is in none."""
    architecture = architecture_of(family)
    with torch.device("meta"):
        parameters = dict(architecture.build(config).named_parameters())
    draws = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in parameters.items():
        if name in architecture.ties(config):
            continue
        weight = torch.randn(parameter.shape, generator=draws)
        if weight.dim() > 1:
            weight *= weight.shape[1] ** -0.5
        else:
            weight = weight * 0.2 + name.endswith("norm.weight")
        weights[name] = weight
    return weights


def tiny_checkpoint(
    folder: Path, *, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Make a complete checkpoint of random weights in `folder`, and give the folder; `overrides` change its config."""
    config = {**tiny_config(family, **overrides), "torch_dtype": str(dtype).removeprefix("torch.")}
    weights = {name: weight.to(dtype) for name, weight in drawn_weights(family, config, seed=seed).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str(pretty=True))
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    said["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2))
    return folder
