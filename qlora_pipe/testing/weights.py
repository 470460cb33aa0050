"""Random weights for tests: large enough that every part of a model shows in its logits, and the same each time."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_pipe.architecture import Architecture


def drawn_weights(architecture: Architecture, config: Mapping[str, Any], *, seed: int) -> dict[str, Tensor]:
    """Draw the weights of any family's model, float32: names and shapes of the module that `build` makes.

    Tied parameters are drawn once. What a weight holds follows from its name, its shape and the seed alone, so a model
    that has one more has the same others.
    """
    with torch.device("meta"):
        module = architecture.build(config)
    tied = architecture.ties(config)
    shapes = {name: tuple(each.shape) for name, each in module.state_dict().items() if name not in tied}
    return {name: _drawn(name, shape, seed=seed) for name, shape in shapes.items()}


def _drawn(name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # A generator's seed is a signed number of 64 bits.
    draws = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    weight = torch.randn(shape, generator=draws)
    if len(shape) > 1:
        return weight.mul_(shape[1] ** -0.5)
    # What scales each component is near one, what is added to it near nothing.
    return weight.mul_(0.2) if name.endswith("bias") else weight.mul_(0.2).add_(1)


def tiny_weights(config: Mapping[str, Any], *, seed: int) -> dict[str, Tensor]:
    """Draw the weights of a LLaMA with this config, float32: names and shapes as in a checkpoint.

    They are one stream of numbers in a fixed order of names, and not those of `drawn_weights`: figures that were
    published, and the bounds of tests, hang on these bytes.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    q_size, kv_size = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    inner, vocabulary = config["intermediate_size"], config["vocab_size"]
    attention = {"q": (q_size, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, q_size)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        for room, linears in (("self_attn", attention), ("mlp", mlp)):
            for name, shape in linears.items():
                path = f"model.layers.{layer}.{room}.{name}_proj"
                shapes[f"{path}.weight"] = shape
                if config.get("attention_bias" if room == "self_attn" else "mlp_bias", False):
                    shapes[f"{path}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)

    draws = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weight.mul_(0.2).add_(1)
        else:
            weight.mul_(0.2 if weight.dim() == 1 else weight.shape[1] ** -0.5)
    return weights
