"""Small checkpoints of random weights, and the model that this package makes of one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.testing import byte_tokenizer, filled
from qlora_pipe_gemma2 import ARCHITECTURE, TINY


def checkpoint(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Make a checkpoint in a folder, with some fields of its config replaced or added, and give the folder."""
    config = {**TINY, **overrides}
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in ARCHITECTURE.build(config).state_dict().items()}
    draws = torch.Generator().manual_seed(seed)
    weights = {}
    for name in sorted(shapes.keys() - ARCHITECTURE.ties(config).keys()):
        # Large enough that every part of the model shows in its logits.
        spread = 0.2 if len(shapes[name]) == 1 else shapes[name][1] ** -0.5
        weights[name] = torch.randn(shapes[name], generator=draws) * spread
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder


def ours(folder: Path, dtype: torch.dtype) -> CausalModel:
    """The model of this package."""
    config = json.loads((folder / "config.json").read_text())
    model = filled(ARCHITECTURE, config, load_file(folder / "model.safetensors"), dtype=dtype)
    assert isinstance(model, CausalModel)
    return model
