"""Gemma 2 against transformers': the same logits, tokens and losses on random models of odd sizes."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import checkpoint, ours
from peer import theirs
from torch import Tensor

from qlora_pipe.errors import ConfigError
from qlora_pipe.generate import generate
from qlora_pipe.generate.graph import CapturedSteps
from qlora_pipe_gemma2 import ARCHITECTURE

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}
LAYERS = {"sliding": "sliding_attention", "full": "full_attention"}


def random_config(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        # transformers wants a multiple, though nothing follows from it.
        "hidden_size": heads * draw.choice([5, 6]),
        "head_dim": draw.choice([4, 14]),
        "intermediate_size": draw.choice([17, 50]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "vocab_size": 259 + draw.randrange(8),
        "rms_norm_eps": draw.choice([1e-5, 1e-6, 1e-3]),
        "rope_theta": draw.choice([500.0, 10000.0]),
        "attention_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "query_pre_attn_scalar": draw.choice([8, 12, 144]),
        "sliding_window": draw.choice([1, 5, 36, 37, 4096]),
        "attn_logit_softcapping": draw.choice([1.0, 50.0, None]),
        "final_logit_softcapping": draw.choice([5.0, 30.0, None]),
    }


def some_ids(*shape: int) -> Tensor:
    return torch.randint(259, shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_same_logits(folder: Path, ids: Tensor, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        got, wanted = ours(folder, dtype)(ids), theirs(folder, dtype)(ids).logits
    largest = wanted.abs().max()
    assert got.dtype == dtype
    assert largest > 0.2, "logits this small would hide a difference"
    assert (got - wanted).abs().max() <= BOUNDS[dtype] * (largest if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_random_models_give_the_logits_of_transformers(tmp_path: Path, seed: int, dtype: torch.dtype) -> None:
    assert_same_logits(checkpoint(tmp_path, seed=seed, **random_config(seed)), some_ids(3, 37), dtype)


@pytest.mark.parametrize("window", [1, 8, 37])
@pytest.mark.parametrize("kinds", [("full", "sliding"), ("sliding", "sliding"), ("full", "full")], ids="-".join)
def test_each_layer_sees_what_its_kind_says(tmp_path: Path, kinds: tuple[str, str], window: int) -> None:
    layers = [LAYERS[kind] for kind in kinds]
    folder = checkpoint(tmp_path, sliding_window=window, layer_types=layers)
    assert_same_logits(folder, some_ids(2, 37), torch.float64)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "rope_theta": None},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}},
    ],
    ids=["linear", "default, in the new form", "yarn"],
)
def test_each_rope_scaling_gives_the_logits_of_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path, **{"max_position_embeddings": 40, **rope})
    assert_same_logits(folder, some_ids(2, 41), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [20, 36, 3072])
def test_embeddings_are_scaled_to_the_last_bit(tmp_path: Path, hidden: int, dtype: torch.dtype) -> None:
    folder, ids = checkpoint(tmp_path, hidden_size=hidden), some_ids(2, 11)
    embedded, _ = ours(folder, dtype).embed(ids)
    assert torch.equal(embedded, theirs(folder, dtype).model.embed_tokens(ids))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_tokens_are_those_of_transformers_however_they_are_made(tmp_path: Path, seed: int) -> None:
    folder, prompt = checkpoint(tmp_path, seed=seed, **random_config(seed)), [1, 70, 71, 72, 9]
    wanted = theirs(folder, torch.float64).generate(
        torch.tensor([prompt]), max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    model = ours(folder, torch.float64)
    # The steps that a GPU replays, run as they are.
    replayed = CapturedSteps(model, ahead=16, capture=lambda step, undo: step)
    for steps in (None, replayed):
        got = list(generate(model, prompt, max_new_tokens=48, stop_ids=(), steps=steps))
        assert got == wanted[0, len(prompt) :].tolist()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"layer_types": ["full_attention"]}, "a list of 2, each one of sliding_attention, full_attention"),
    ({"layer_types": "full_attention"}, "a list of 2, each one of sliding_attention, full_attention"),
    ({"layer_types": ["full_attention", {}]}, "a list of 2, each one of sliding_attention, full_attention"),
    ({"sliding_window": 0}, '"sliding_window" is 0; it must be a whole number from 1'),
    ({"attn_logit_softcapping": 0}, '"attn_logit_softcapping" is 0; it must be a finite number above 0'),
    ({"final_logit_softcapping": math.nan}, '"final_logit_softcapping" is nan'),
    ({"query_pre_attn_scalar": -1}, '"query_pre_attn_scalar" is -1'),
    ({"head_dim": 7}, '"head_dim" is 7; it must be even'),
    ({"num_key_value_heads": 3}, "a divisor of num_attention_heads, which is 4"),
    ({"hidden_activation": "tanh"}, "\"hidden_activation\" is 'tanh'; it must be one of"),
    ({"use_bidirectional_attention": True}, "false: a position sees only those before it here"),
]


@pytest.mark.parametrize(("overrides", "said"), WRONG, ids=[str(wrong) for wrong, _ in WRONG])
def test_a_config_that_cannot_be_built_is_refused_by_its_field(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ARCHITECTURE.build({**ARCHITECTURE.tiny, **overrides})


def test_absent_fields_have_the_values_of_the_format_and_null_turns_a_cap_off() -> None:
    absent = ("query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    config = {name: value for name, value in ARCHITECTURE.tiny.items() if name not in absent}
    with torch.device("meta"):
        model: Any = ARCHITECTURE.build(config)
        uncapped: Any = ARCHITECTURE.build({**config, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert model.config.scores[0] == (4096, 50.0, 1 / 16)
    assert model.config.scores[1] == (None, 50.0, 1 / 16)
    assert model.head_softcap == 30.0
    assert uncapped.config.scores[1] == (None, None, 1 / 16)
    assert uncapped.head_softcap is None
