"""Tiny checkpoints of the T5 family: complete folders of random weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor

from qlora_pipe.testing import byte_tokenizer
from qlora_plugins.t5 import build, ties

TINY_T5: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 72,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 259,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


def t5_config(**overrides: Any) -> dict[str, Any]:
    """The fields of config.json with some replaced or, as None, removed."""
    return {name: value for name, value in {**TINY_T5, **overrides}.items() if value is not None}


def t5_weights(config: Mapping[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """Draw weights, float32, large enough that every part of the model shows in its logits."""
    with torch.device("meta"):
        model = build(config)
    tied = ties(config)
    draws = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in ((name, part.shape) for name, part in model.state_dict().items() if name not in tied):
        weight = torch.randn(shape, generator=draws)
        if name.endswith("norm.weight"):
            weights[name] = weight.mul_(0.2).add_(1)
        elif name in ("shared.weight", "lm_head.weight") or "relative_attention_bias" in name:
            weights[name] = weight
        else:
            # The scores of attention are not scaled, so the queries are small.
            weights[name] = weight.mul_(shape[1] ** -0.5 * (0.5 if name.endswith(".q.weight") else 1.0))
    return weights


def t5_checkpoint(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Make a complete checkpoint in `folder`, and give the folder.

    `overrides` replace fields of config.json. The tokenizer knows the 256 bytes, and puts EOS, 2, behind a text.
    """
    config = t5_config(**overrides) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(dtype) for name, weight in t5_weights(config, seed=seed).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {
        "config.json": config,
        "generation_config.json": {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return folder
