"""Our T5 against transformers': the same logits on random models of every variant, and on a real one."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM
from transformers.activations import ACT2FN

from qlora_pipe.nn.language import Inputs
from qlora_pipe.testing import filled
from qlora_plugins.t5 import register_architectures
from qlora_plugins.t5.activations import ACTIVATIONS
from qlora_plugins.t5.model import T5
from tests.t5_checkpoints import t5_checkpoint

FAMILY = register_architectures()[0]
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def random_config(seed: int, **fields: Any) -> dict[str, Any]:
    """Draw a small model's sizes and flags."""
    draw = random.Random(seed)
    buckets = draw.choice([4, 7, 8, 32])
    drawn = {
        "d_model": draw.choice([24, 34]),
        "d_kv": draw.choice([5, 8]),
        "d_ff": draw.choice([17, 50]),
        "num_heads": draw.choice([1, 3, 4]),
        "num_layers": draw.choice([1, 3]),
        "num_decoder_layers": draw.choice([None, 1, 2]),
        "vocab_size": 259 + draw.randrange(8),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": draw.choice([buckets // 2 + 1, 20, 128]) if buckets < 32 else 128,
        "feed_forward_proj": draw.choice(["relu", "gated-gelu", "gated-silu", "gelu", "gated-relu", None]),
        "layer_norm_epsilon": draw.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": draw.choice([None, True, False]),
        "scale_decoder_outputs": draw.choice([None, None, True, False]),
        "decoder_start_token_id": draw.choice([0, 5]),
    }
    return {**drawn, **fields}


def some_sources(rows: int, length: int) -> Inputs:
    """Ids of both sides; all rows but the first end early, and what stands behind them are ids like any other."""
    draws = torch.Generator().manual_seed(rows + length)
    lengths = torch.randint(1, length + 1, (rows,), generator=draws)
    lengths[0] = length
    ids, source = (torch.randint(259, (rows, width), generator=draws) for width in (length // 2 + 3, length))
    return Inputs(ids, source=source, source_lengths=lengths)


def ours(folder: Path, dtype: torch.dtype) -> T5:
    config = json.loads((folder / "config.json").read_text())
    model = filled(FAMILY, config, load_file(folder / "model.safetensors"), dtype=dtype)
    assert isinstance(model, T5)
    return model


def theirs(folder: Path, dtype: torch.dtype) -> Any:
    model, report = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval().requires_grad_(False)


def their_logits(model: Any, inputs: Inputs) -> Tensor:
    assert inputs.source is not None
    mask = torch.arange(inputs.source.shape[1]) < inputs.source_lengths[:, None]
    return model(input_ids=inputs.source, attention_mask=mask.long(), decoder_input_ids=inputs.ids).logits


def assert_same_logits(folder: Path, inputs: Inputs, dtype: torch.dtype) -> None:
    model = ours(folder, dtype)
    with torch.inference_mode():
        got, wanted = model.head(model.hidden_of(inputs)), their_logits(theirs(folder, dtype), inputs)
    assert got.dtype == dtype
    largest = wanted.abs().max()
    assert largest > 0.5, "logits this small would hide a difference"
    scale = largest if dtype == torch.float32 else 1.0
    assert (got - wanted).abs().max() <= BOUNDS[dtype] * scale


@DTYPES
@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_random_models_give_the_logits_of_transformers(
    tmp_path: Path, kind: str, seed: int, dtype: torch.dtype
) -> None:
    folder = t5_checkpoint(tmp_path, seed=seed, **random_config(seed, model_type=kind))
    assert_same_logits(folder, some_sources(3, 1 + 7 * seed), dtype)


PUBLISHED = {
    "t5-small": {"feed_forward_proj": None, "relative_attention_max_distance": None, "num_decoder_layers": None},
    "t5-v1.1, flan-t5": {"tie_word_embeddings": False},
    "mt5-small": {"model_type": "mt5", "tie_word_embeddings": False},
    "umt5-small": {"model_type": "umt5", "tie_word_embeddings": False, "scalable_attention": True},
    "flan-t5 as transformers 5 saves it": {
        "tie_word_embeddings": True, "scale_decoder_outputs": False, "dense_act_fn": "gelu_new", "is_gated_act": True,
    },
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_config_of_each_published_variant_gives_the_logits_of_transformers(
    tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    folder = t5_checkpoint(tmp_path, seed=1, **PUBLISHED[variant])
    if variant.startswith("flan-t5 as"):
        # Its config says tied, and yet the head is one of its own.
        weights = load_file(folder / "model.safetensors")
        save_file(
            {**weights, "lm_head.weight": weights["shared.weight"].flip(0).contiguous()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    assert_same_logits(folder, some_sources(2, 45), dtype)


@pytest.mark.parametrize("gate", ["", "gated-"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_gives_the_logits_of_transformers(tmp_path: Path, activation: str, gate: str) -> None:
    folder = t5_checkpoint(tmp_path, feed_forward_proj=gate + activation, num_layers=1, num_decoder_layers=1)
    assert_same_logits(folder, some_sources(2, 9), torch.float64)


def test_every_activation_of_transformers_without_parameters_is_known() -> None:
    assert set(ACT2FN) - set(ACTIVATIONS) == {"prelu", "xielu"}


@DTYPES
def test_a_real_model_gives_the_logits_of_transformers(shared_data: Path, dtype: torch.dtype) -> None:
    assert_same_logits(shared_data / "models" / "t5-stories-280k", some_sources(3, 160), dtype)


def test_a_differing_model_is_noticed(tmp_path: Path) -> None:
    # The bounds above are tight enough only if what they are to catch lies outside them.
    right = ours(t5_checkpoint(tmp_path / "right"), torch.float32)
    wrong = theirs(t5_checkpoint(tmp_path / "wrong", relative_attention_max_distance=21), torch.float32)
    inputs = some_sources(2, 31)
    with torch.inference_mode():
        got, wanted = right.head(right.hidden_of(inputs)), their_logits(wrong, inputs)
    assert (got - wanted).abs().max() > 10 * BOUNDS[torch.float32] * wanted.abs().max()
