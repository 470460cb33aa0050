"""Our LLaMA against transformers': the same logits and the same tokens, on random models and on a real one."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from qlora_pipe.generate import generate
from qlora_pipe.nn.decoder import DecoderModel
from qlora_pipe.testing import filled, tiny_checkpoint
from qlora_plugins.llama import register_architectures

LLAMA = register_architectures()[0]
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
YARN = {"factor": 4.0, "original_max_position_embeddings": 24}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500000.0},
    "default, in the new form": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "linear, by its oldest key": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 5000.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "rope_theta": 3000.0},
    "dynamic, of an odd factor": {"rope_parameters": {"rope_type": "dynamic", "factor": 3.7, "rope_theta": 10000.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500000.0},
    "llama3, in the new form": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    "llama3, with slow pairs": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 20.0},
    "yarn": {"rope_scaling": {"type": "yarn", **YARN}},
    "yarn, in the new form": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}},
    "yarn, betas and no truncation": {
        "rope_scaling": {"rope_type": "yarn", "beta_fast": 4, "beta_slow": 0.5, "truncate": False, **YARN}
    },
    "yarn, a ramp of no width": {"rope_scaling": {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 4, **YARN}},
    "yarn, two mscales": {"rope_scaling": {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.3, **YARN}},
    "yarn, attention_factor": {"rope_scaling": {"rope_type": "yarn", "attention_factor": 1.25, **YARN}},
    "yarn, the factor implied": {
        "rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    },
    "yarn, original beside": {"rope_scaling": {"rope_type": "yarn", **YARN}, "original_max_position_embeddings": 12},
}

# As published, each size of a model scaled down by a number of its own, the positions by 1024; None leaves a field out.
_SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 1": {
        "num_key_value_heads": None, "rope_theta": None, "attention_bias": None, "mlp_bias": None,
        "max_position_embeddings": 2048, "max_sequence_length": 2048, "rms_norm_eps": 1e-06,
        "architectures": ["LLaMAForCausalLM"], "initializer_range": 0.02, "use_cache": True,
    },
    "Llama 1, its first conversion": {
        "num_key_value_heads": None, "rope_theta": None, "attention_bias": None, "mlp_bias": None,
        "max_position_embeddings": None, "max_sequence_length": 2048, "tie_word_embeddings": None,
    },
    "Llama 2 7B": {"num_key_value_heads": 4, "max_position_embeddings": 4096, "pretraining_tp": 1},
    "Llama 2 70B": {
        "num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 64, "max_position_embeddings": 4096,
    },
    "Llama 3 8B": {
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "attention_dropout": 0.0, "pretraining_tp": 1,
    },
    "Llama 3.1 8B": {
        "max_position_embeddings": 128, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **_SCALED},
    },
    "Llama 3.2 1B": {
        "num_attention_heads": 8, "hidden_size": 64, "head_dim": 8, "max_position_embeddings": 128,
        "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **_SCALED, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "Llama 3.2 3B": {
        "num_attention_heads": 6, "hidden_size": 48, "head_dim": 16, "max_position_embeddings": 128,
        "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **_SCALED, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "Llama 3.3 70B": {
        "num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 64, "max_position_embeddings": 128,
        "eos_token_id": [1, 8, 9], "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **_SCALED},
    },
    "Llama 3.3, saved by transformers 5": {
        "head_dim": 8, "rope_theta": None, "max_position_embeddings": 128, "pretraining_tp": 1, "use_cache": True,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **_SCALED},
    },
}  # fmt: skip


def random_config(seed: int) -> dict[str, Any]:
    """Draw a small model's sizes and flags; its trained context ends at 40 positions."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * draw.choice([6, 10]),
        "head_dim": draw.choice([None, 4, 14]),
        "intermediate_size": draw.choice([17, 50]),
        "num_hidden_layers": draw.choice([1, 3]),
        "vocab_size": 259 + draw.randrange(8),
        "max_position_embeddings": 40,
        "rms_norm_eps": draw.choice([1e-5, 1e-6, 1e-3]),
        "hidden_act": draw.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu"]),
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
    }


def some_ids(*shape: int, below: int = 259) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def ours(folder: Path, dtype: torch.dtype) -> DecoderModel:
    config = json.loads((folder / "config.json").read_text())
    model = filled(LLAMA, config, load_file(folder / "model.safetensors"), dtype=dtype)
    assert isinstance(model, DecoderModel)
    return model


def theirs(folder: Path, dtype: torch.dtype) -> Any:
    """Load the peer anew: with dynamic scaling it remembers the longest sequence it has seen."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)


def assert_same_logits(folder: Path, ids: Tensor, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        got, wanted = ours(folder, dtype)(ids), theirs(folder, dtype)(ids).logits
    assert got.dtype == dtype
    largest = wanted.abs().max()
    assert largest > 0.5, "logits this small would hide a difference"
    scale = largest if dtype == torch.float32 else 1.0
    assert (got - wanted).abs().max() <= BOUNDS[dtype] * scale


def assert_same_tokens(folder: Path, prompt: list[int], dtype: torch.dtype) -> None:
    wanted = theirs(folder, dtype).generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    got = list(generate(ours(folder, dtype), prompt, max_new_tokens=64, stop_ids=()))
    assert got == wanted[0, len(prompt) :].tolist()
    assert len(got) == 64


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_random_models_give_the_logits_of_transformers(tmp_path: Path, seed: int, dtype: torch.dtype) -> None:
    config = random_config(seed)
    folder = tiny_checkpoint(tmp_path, seed=seed, **config)
    assert_same_logits(folder, some_ids(3, 37), dtype)


@pytest.mark.parametrize("null", [False, True], ids=["absent", "null"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_scaled_down_gives_the_logits_of_transformers(
    tmp_path: Path, name: str, dtype: torch.dtype, null: bool
) -> None:
    folder = tiny_checkpoint(tmp_path, **PUBLISHED[name])
    if null:
        config = json.loads((folder / "config.json").read_text())
        for field in ("head_dim", "rope_scaling", "num_key_value_heads"):
            config.setdefault(field, None)
        (folder / "config.json").write_text(json.dumps(config))
    assert_same_logits(folder, some_ids(2, 51), dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("length", [23, 40, 41, 90])
@pytest.mark.parametrize("rope", ROPES)
def test_each_rope_scaling_gives_the_logits_of_transformers(
    tmp_path: Path, rope: str, length: int, dtype: torch.dtype
) -> None:
    folder = tiny_checkpoint(tmp_path, max_position_embeddings=40, head_dim=12, **ROPES[rope])
    assert_same_logits(folder, some_ids(2, length), dtype)


@pytest.mark.parametrize("rope", ["default", "linear", "dynamic", "dynamic, of an odd factor", "llama3", "yarn"])
def test_greedy_tokens_are_those_of_transformers_past_the_trained_context(tmp_path: Path, rope: str) -> None:
    # The default kind is vouched for up to the trained context only.
    max_positions = 80 if rope == "default" else 40
    folder = tiny_checkpoint(tmp_path, **{**random_config(5), "max_position_embeddings": max_positions, **ROPES[rope]})
    assert_same_tokens(folder, [1, 70, 71, 72, 9], torch.float64)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_real_model_gives_the_logits_and_tokens_of_transformers(shared_data: Path, dtype: torch.dtype) -> None:
    folder = shared_data / "models" / "stories260K"
    assert_same_logits(folder, some_ids(3, 200, below=512), dtype)
    assert_same_tokens(folder, [1, 403, 407, 261, 378], dtype)
    assert_same_tokens(folder, [1], dtype)


def test_a_differing_model_is_noticed(tmp_path: Path) -> None:
    # The bounds above are tight enough only if what they are to catch lies outside them.
    right = tiny_checkpoint(tmp_path / "right", rope_theta=10000.0)
    wrong = tiny_checkpoint(tmp_path / "wrong", rope_theta=10010.0)
    ids = some_ids(1, 37)
    with torch.inference_mode():
        got, wanted = ours(right, torch.float32)(ids), theirs(wrong, torch.float32)(ids).logits
    assert (got - wanted).abs().max() > 10 * BOUNDS[torch.float32] * wanted.abs().max()
