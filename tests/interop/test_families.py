"""The families beside LLaMA against transformers: logits, gradients, tokens, adapters, and stores in 4 bits."""

import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_formats.adapter import AdapterFolder
from qlora_pipe.generate import generate
from qlora_pipe.nn.decoder import DecoderModel
from qlora_pipe.testing import filled
from tests.families import FAMILIES, architecture_of, tiny_checkpoint
from tests.interop.peers import (
    in_float32,
    layers_in_4_bits,
    our_weights,
    ours,
    plain_model,
    run,
    some_ids,
    their_weights,
    theirs,
)

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}
YARN = {"factor": 4.0, "original_max_position_embeddings": 24}

# As published, each size of a model scaled down by a number of its own; the positions by 1024.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral-7B-v0.1": (
        "mistral",
        {"max_position_embeddings": 32, "sliding_window": 4, "rms_norm_eps": 1e-05, "rope_theta": 10000.0},
    ),
    "Mistral-7B-v0.3": (
        "mistral",
        {"attention_dropout": 0.0, "sliding_window": None, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0},
    ),
    "Mistral-Nemo-2407": (
        "mistral",
        {"hidden_size": 40, "head_dim": 8, "sliding_window": None, "max_position_embeddings": 125, "rope_theta": 1e6},
    ),
    "Mistral, saved by transformers 5": (
        "mistral",
        {
            "head_dim": 8, "rope_theta": None, "sliding_window": 9,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    ),
    "Qwen2-0.5B": (
        "qwen2",
        {
            "hidden_size": 56, "num_attention_heads": 14, "intermediate_size": 304, "max_window_layers": 24,
            "max_position_embeddings": 128, "sliding_window": 128, "tie_word_embeddings": True,
        },
    ),
    "Qwen2.5-7B-Instruct": (
        "qwen2",
        {
            "hidden_size": 56, "num_attention_heads": 14, "max_position_embeddings": 32, "max_window_layers": 28,
            "sliding_window": 128, "tie_word_embeddings": False,
        },
    ),
    "Qwen2.5 for long texts": (
        "qwen2",
        {
            "max_position_embeddings": 32, "sliding_window": 128,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"},
        },
    ),
    "Qwen2, saved by transformers 5": (
        "qwen2",
        {
            "layer_types": ["full_attention"] * 2, "sliding_window": None, "rope_theta": None,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        },
    ),
    "Qwen3-0.6B": (
        "qwen3",
        {"head_dim": 16, "max_position_embeddings": 40, "max_window_layers": 28, "tie_word_embeddings": True},
    ),
    "Qwen3-32B": (
        "qwen3",
        {"hidden_size": 40, "num_attention_heads": 8, "head_dim": 16, "max_window_layers": 64},
    ),
    "Qwen3 for long texts": (
        "qwen3",
        {
            "max_position_embeddings": 128,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
    ),
}  # fmt: skip

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": {"type": "yarn", **YARN}},
    "yarn, attention_factor": {"rope_scaling": {"rope_type": "yarn", "attention_factor": 1.25, **YARN}},
    "yarn, two mscales": {"rope_scaling": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.8, **YARN}},
    "yarn, in the new form": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "beta_fast": 8, **YARN}},
}


def random_config(family: str, seed: int) -> dict[str, Any]:
    """Draw a small model's sizes and flags; where it has a window, texts of 37 tokens are longer."""
    draw = random.Random(f"{family} {seed}")
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    layers = draw.choice([1, 3])
    config = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * draw.choice([6, 10]),
        "intermediate_size": draw.choice([17, 50]),
        "num_hidden_layers": layers,
        "vocab_size": 259 + draw.randrange(8),
        "rms_norm_eps": draw.choice([1e-5, 1e-6, 1e-3]),
        "hidden_act": draw.choice(["silu", "silu", "gelu_pytorch_tanh", "relu"]),
        "tie_word_embeddings": draw.random() < 0.5,
        "sliding_window": draw.choice([1, 5, 16, 36, 37, 50]),
    }
    if family == "mistral":
        config |= draw.choice([{}, {"head_dim": 14}, {"sliding_window": None}])
    else:
        config |= {
            "use_sliding_window": draw.random() < 0.7,
            "max_window_layers": draw.randrange(layers + 1),
        }
        if config["use_sliding_window"] and draw.random() < 0.3:
            config["layer_types"] = draw.choices(["full_attention", "sliding_attention"], k=layers)
    if family == "qwen3":
        config |= {"head_dim": draw.choice([4, 14]), "attention_bias": draw.random() < 0.5}
    return config


def ours_in(folder: Path, dtype: torch.dtype) -> DecoderModel:
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    model = filled(architecture_of(config["model_type"]), config, weights, dtype=dtype)
    assert isinstance(model, DecoderModel)
    return model


def theirs_in(folder: Path, dtype: torch.dtype) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.requires_grad_(False)


def assert_same_logits(folder: Path, ids: Tensor, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        got, wanted = ours_in(folder, dtype)(ids), theirs_in(folder, dtype)(ids).logits
    assert got.dtype == wanted.dtype == dtype
    largest = wanted.abs().max()
    assert largest > 0.5, "logits this small would hide a difference"
    assert (got - wanted).abs().max() <= BOUNDS[dtype] * (largest if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_give_the_logits_of_transformers(
    tmp_path: Path, family: str, seed: int, dtype: torch.dtype
) -> None:
    folder = tiny_checkpoint(tmp_path, family=family, seed=seed, **random_config(family, seed))
    assert_same_logits(folder, some_ids(3, 37), dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_scaled_down_gives_the_logits_of_transformers(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    family, fields = PUBLISHED[name]
    folder = tiny_checkpoint(tmp_path, family=family, **fields)
    assert_same_logits(folder, some_ids(2, 51), dtype)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_rope_scaling_gives_the_logits_of_transformers(tmp_path: Path, family: str, rope: str) -> None:
    folder = tiny_checkpoint(tmp_path, family=family, max_position_embeddings=40, sliding_window=None, **ROPES[rope])
    for length in (23, 41, 90):
        assert_same_logits(folder, some_ids(2, length), torch.float64)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"sliding_window": 11}),
        ("mistral", {"sliding_window": 2}),
        ("mistral", {"sliding_window": None, "head_dim": 14}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        ("qwen3", {"max_position_embeddings": 20, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "attention_bias": True, "max_window_layers": 0}),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_transformers_past_the_window(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(tmp_path, family=family, seed=2, **fields)
    for prompt in ([1, 70, 71, 72, 9], [1, *some_ids(17).tolist()]):
        wanted = theirs_in(folder, torch.float64).generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        got = list(generate(ours_in(folder, torch.float64), prompt, max_new_tokens=40, stop_ids=()))
        assert got == wanted[0, len(prompt) :].tolist()
        assert len(got) == 40


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_embedded_tokens_are_those_of_transformers(
    tmp_path: Path, family: str, seed: int, frozen: bool
) -> None:
    config = random_config(family, seed) | {"hidden_act": "silu"}
    folder = tiny_checkpoint(tmp_path, family=family, seed=seed, **config)
    model, peer = ours_in(folder, torch.float64), theirs_in(folder, torch.float64)
    if not frozen:
        model.requires_grad_(True)
    ids = some_ids(2, 37)
    embedded, told = model.embed(ids)
    weights = torch.randn(2, 37, config["vocab_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = leaf = embedded.detach().requires_grad_()
    for block in model.blocks:
        state = block(state, told)
    (got,) = torch.autograd.grad((model.head(model.finish(state)) * weights).sum(), leaf)
    their_leaf = embedded.detach().requires_grad_()
    (wanted,) = torch.autograd.grad((peer(inputs_embeds=their_leaf).logits * weights).sum(), their_leaf)
    # Norms compute in float32 on either side, forward and backward.
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_chain_runs_and_the_peers_read_what_each_stage_leaves(tmp_path: Path, family: str, bits: int) -> None:
    # Whole blocks in a row: the code that bitsandbytes has for some processors mixes up scales of others.
    base = tiny_checkpoint(
        tmp_path / "source", family=family, seed=5, hidden_size=64, head_dim=16, intermediate_size=128
    )
    if bits == 4:
        run("quantize", base, tmp_path / "store")
        base = tmp_path / "store"
    (tmp_path / "text.txt").write_text("the fox and the hen and the fox\n" * 60)
    run(
        "finetune", base, "--data", f"text:{tmp_path / 'text.txt'}", "--out", tmp_path / "run", "--steps", 6,
        "--learning-rate", 2e-2, "--batch-size", 2, "--max-tokens", 64, "--rank", 3, "--held-out", 0.2, "--pack",
    )  # fmt: skip
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["eval_loss"] < 0.9 * metrics[0]["eval_loss_start"]
    run("merge", base, tmp_path / "run", tmp_path / "merged", "--dtype", "float32")

    ids = some_ids(2, 61)
    peer = in_float32(PeftModel.from_pretrained(theirs(base), tmp_path / "run" / "final"))
    with torch.inference_mode():
        got, before = ours(base, adapter=tmp_path / "run")(ids), ours(base)(ids)
        bound = 1e-5 * float(before.abs().max())
        assert (got - before).abs().max() > 0.1, "an adapter that changes so little hides differences"
        assert (before - in_float32(theirs(base))(ids).logits).abs().max() <= bound
        assert (got - peer(ids).logits).abs().max() <= bound
        assert (got - ours(tmp_path / "merged")(ids)).abs().max() <= bound
        assert (got - theirs(tmp_path / "merged")(ids).logits).abs().max() <= bound
    read = peft.get_peft_model_state_dict(peer)
    assert all(
        torch.equal(read[name], tensor)
        for name, tensor in load_file(tmp_path / "run" / "final" / "adapter_model.safetensors").items()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_peft_gives_its_logits(tmp_path: Path, family: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", family=family, num_hidden_layers=3, max_window_layers=3)
    torch.manual_seed(1)
    settings = {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}, "init_lora_weights": False}
    adapted = get_peft_model(theirs(base), LoraConfig(r=5, lora_alpha=7, task_type="CAUSAL_LM", **settings)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    assert len(AdapterFolder.open(tmp_path / "adapter").modules) == 7 * 3
    ids = some_ids(2, 61)
    with torch.inference_mode():
        got, wanted = ours(base, adapter=tmp_path / "adapter")(ids), adapted(ids).logits
        assert (got - ours(base)(ids)).abs().max() > 0.05
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_a_store_of_odd_widths_with_our_weights_and_logits(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    source = tiny_checkpoint(tmp_path / "source", family=family, dtype=dtype, hidden_size=40, intermediate_size=71)
    run("quantize", source, tmp_path / "store")
    model, stored = theirs(tmp_path / "store"), our_weights(tmp_path / "store")
    packed = their_weights(model)
    assert packed.keys() == {f"{path}.weight" for path, _ in layers_in_4_bits(model)}
    assert len(packed) == 7 * 2
    state = model.state_dict() | packed
    assert all(torch.equal(state[name], weight) for name, weight in stored.items())
    ids, dense = some_ids(2, 61), plain_model(tmp_path / "store", our_weights(tmp_path / "store", dtype=torch.float32))
    with torch.inference_mode():
        wanted = dense(ids).logits
        assert (ours(tmp_path / "store")(ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_differing_model_is_noticed(tmp_path: Path) -> None:
    # The bounds above are tight enough only if what they are to catch lies outside them.
    for number, (family, right, wrong) in enumerate(
        [
            ("mistral", {"sliding_window": 20}, {"sliding_window": 21}),
            ("qwen2", {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-4}),
            ("qwen3", {"rope_theta": 10000.0}, {"rope_theta": 10010.0}),
        ]
    ):
        one = tiny_checkpoint(tmp_path / f"one {number}", family=family, **right)
        other = tiny_checkpoint(tmp_path / f"other {number}", family=family, **wrong)
        ids = some_ids(1, 37)
        with torch.inference_mode():
            got, wanted = ours_in(one, torch.float32)(ids), theirs_in(other, torch.float32)(ids).logits
        assert (got - wanted).abs().max() > 10 * BOUNDS[torch.float32] * wanted.abs().max()
