"""Small checkpoints of random weights, and the model that this package makes of one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.testing import filled, tiny_checkpoint
from qlora_pipe_gemma2 import ARCHITECTURE


def checkpoint(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Make a checkpoint in a folder, with fields of its config replaced or added; what is None is null in it."""
    tiny_checkpoint(folder, family=ARCHITECTURE, seed=seed, **overrides)
    file = folder / "config.json"
    nulls = dict.fromkeys(name for name, value in overrides.items() if value is None)
    file.write_text(json.dumps({**json.loads(file.read_text()), **nulls}))
    return folder


def ours(folder: Path, dtype: torch.dtype) -> CausalModel:
    """The model of this package."""
    config = json.loads((folder / "config.json").read_text())
    model = filled(ARCHITECTURE, config, load_file(folder / "model.safetensors"), dtype=dtype)
    assert isinstance(model, CausalModel)
    return model
