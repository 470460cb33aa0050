"""For the tests of plugin authors, and our own: tiny checkpoints, whole and deterministic, and models from weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from qlora_formats.commit import write_file
from qlora_pipe.architecture import Architecture

_CONTROL_TOKENS = ("<unk>", "<s>", "</s>")
_TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(_CONTROL_TOKENS) + 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_checkpoint(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Make a complete LLaMA checkpoint of random weights in `folder`, and give the folder.

    `overrides` replace or extend the fields of config.json (None removes one): sizes, biases, RoPE scaling, a tied
    head. The tokenizer knows the 256 bytes and three control tokens, so it encodes any text; BOS is 1, EOS is 2. The
    same arguments give the same bytes.
    """
    config = {key: value for key, value in {**_TINY_LLAMA, **overrides}.items() if value is not None}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(dtype) for name, weight in tiny_weights(config, seed=seed).items()}
    write_file(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    write_file(folder / "tokenizer.json", byte_tokenizer().to_str(pretty=True).encode())
    described = {
        "config.json": config,
        "generation_config.json": {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
        },
    }
    for name, content in described.items():
        write_file(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    return folder


def tiny_weights(config: Mapping[str, Any], *, seed: int) -> dict[str, Tensor]:
    """Draw the weights of a LLaMA with this config, float32: names and shapes as in a checkpoint.

    They are large enough that every part of the model shows in its logits.
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


def filled(
    architecture: Architecture, config: Mapping[str, Any], weights: Mapping[str, Tensor], *, dtype: torch.dtype
) -> nn.Module:
    """Build a model and fill it with weights, ready to compute: for tests of a plugin's modules without a folder.

    RuntimeError where names or shapes of weights and model differ.
    """
    with torch.device("meta"):
        model = architecture.build(config)
    tied = {name: weights[source] for name, source in architecture.ties_of(config, weights).items()}
    model.load_state_dict({**weights, **tied}, assign=True)
    return model.to(dtype).eval().requires_grad_(False)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Make a tokenizer of three control tokens, ids 0 to 2, and the 256 bytes; it puts BOS in front of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_CONTROL_TOKENS, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_CONTROL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer
