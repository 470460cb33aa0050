"""The two sides of a comparison: a model folder as loaded here, and as transformers and bitsandbytes load it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_formats.store import StoredWeight
from qlora_kernels.dispatch import dequantize
from qlora_pipe.artifacts import Adapter, Checkpoint, open_model
from qlora_pipe.cli import execute
from qlora_pipe.nn.linear import quantized_tensor
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.stages.load import load

# Odd widths, blocks that span rows and end early, each head layout, biases, a tied head, each source type.
ODD_MODELS: Mapping[str, dict[str, Any]] = {
    "float32, 66 x 173": {
        "hidden_size": 66, "head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 173,
        "num_hidden_layers": 3,
    },
    "bfloat16, 33 x 172, biases": {
        "hidden_size": 33, "head_dim": 4, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 172,
        "attention_bias": True, "mlp_bias": True, "dtype": torch.bfloat16,
    },
    "float16, 96 x 17, tied": {
        "hidden_size": 96, "intermediate_size": 17, "tie_word_embeddings": True, "dtype": torch.float16,
    },
    "float32, weights of odd length": {
        "hidden_size": 7, "head_dim": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 5,
        "num_hidden_layers": 1,
    },
}  # fmt: skip


def run(*words: object) -> None:
    """Run a command that must succeed."""
    assert execute([str(word) for word in words]) == 0


def some_ids(*shape: int, below: int = 259) -> Tensor:
    """Random token ids, the same for the same arguments."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(sum(shape)))


def ours(folder: Path, *, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model as `generate` and `finetune` load it on a CPU, with an adapter beside its weights."""
    base = open_model(folder)
    architecture = find_architecture(load_plugins(), base.config["model_type"])
    opened = None if adapter is None else Adapter.open(adapter)
    return load(base, architecture, dtype=dtype, device=torch.device("cpu"), adapter=opened).module


def our_weights(folder: Path, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every weight of a folder, dense: 4-bit ones in `dtype`, or in that of their source."""
    model = open_model(folder)
    if isinstance(model, Checkpoint):
        return {name: model.weights.tensor(name) for name in model.weights.names}
    stored = {name: model.weights.weight(name) for name in model.weights.names}
    return {
        name: dequantize(quantized_tensor(weight, name=name), dtype or weight.dtype)
        if isinstance(weight, StoredWeight)
        else weight
        for name, weight in stored.items()
    }


def theirs(folder: Path) -> PreTrainedModel:
    """A folder as transformers (and bitsandbytes, for a store) load it, with nothing missing and nothing left over."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert isinstance(model, PreTrainedModel)
    return model.requires_grad_(False)


def in_float32(model: nn.Module) -> nn.Module:
    """Make a model with bitsandbytes' layers compute in float32, whatever the source's type; gives the model.

    A layer that is not in training takes a path in bfloat16 on processors that have the instructions for it, so these
    layers, in which it makes no other difference, are told that they are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for _, layer in layers_in_4_bits(model):
        layer.train()
        layer.compute_dtype = torch.float32
        layer.weight.quant_state.dtype = torch.float32
    return model


def layers_in_4_bits(model: nn.Module) -> Iterator[tuple[str, Linear4bit]]:
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            yield name, layer


def their_weights(model: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every 4-bit weight as bitsandbytes dequantises it, in `dtype` or in that of its source."""
    return {
        f"{name}.weight": dequantized_by_the_peer(layer.weight.data, layer.weight.quant_state, dtype=dtype)
        for name, layer in layers_in_4_bits(model)
    }


def dequantized_by_the_peer(packed: Tensor, state: Any, *, dtype: torch.dtype | None = None) -> Tensor:
    """A weight as bitsandbytes dequantises its packed bytes, in `dtype` or in that of its source."""
    shape, source = state.shape, state.dtype
    # A last dimension of one sends the peer down its plain path: the vector code it has for some processors mixes up
    # scales where a block spans rows. That path is compiled anew for each shape unless it is told not to be.
    state.shape, state.dtype = (shape.numel(), 1), dtype or source
    with torch.compiler.set_stance("force_eager"):
        dense = bitsandbytes.functional.dequantize_4bit(packed, state)
    state.shape, state.dtype = shape, source
    return dense.view(shape)


def plain_model(folder: Path, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """transformers' model with this folder's config, in float32 and unquantised, filled with dense weights."""
    config = dict(open_model(folder).config)
    config.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).float().eval().requires_grad_(False)
    names = model.state_dict().keys()
    tied = dict.fromkeys(names - weights.keys(), weights["model.embed_tokens.weight"])
    assert set(tied) <= {"lm_head.weight"}
    model.load_state_dict({**weights, **tied})
    return model
