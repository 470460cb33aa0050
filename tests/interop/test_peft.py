"""LoRA adapters against PEFT: it reads ours, we read its, and the logits are the same."""

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlora_formats.adapter import AdapterFolder
from qlora_pipe.testing import tiny_checkpoint
from tests.interop.peers import in_float32, our_weights, ours, plain_model, run, some_ids, theirs

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = [
    "down_proj",
    "self_attn.q_proj",
    "layers.0.mlp.up_proj",
    r"layers\.1\..*_proj",
    "model.layers.1.mlp.gate_proj",
]


def random_adapter(base: Path, out: Path, *, seed: int, **settings: Any) -> nn.Module:
    """Let PEFT make an adapter of drawn settings whose B is not zero, save it, and give PEFT's model."""
    draw = random.Random(seed)
    drawn = {
        "r": draw.randrange(1, 9),
        "lora_alpha": draw.choice([1, 8, 16, 3.5]),
        "use_rslora": draw.random() < 0.5,
        # PEFT saves patterns sorted and takes the first that fits: unsorted, it would not read its own file.
        "rank_pattern": {
            pattern: draw.randrange(1, 12) for pattern in sorted(draw.sample(PATTERNS, draw.randrange(4)))
        },
        "alpha_pattern": {
            pattern: draw.randrange(1, 40) for pattern in sorted(draw.sample(PATTERNS, draw.randrange(4)))
        },
        "target_modules": draw.sample(PROJECTIONS, draw.randrange(2, 8)),
        "lora_dropout": draw.choice([0.0, 0.1]),
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    torch.manual_seed(seed)
    model = get_peft_model(theirs(base), LoraConfig(**{**drawn, **settings})).eval()
    model.save_pretrained(out, save_embedding_layers=False)
    return model


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.dtype == b.dtype == torch.float32
    return float((a - b).abs().max())


def test_peft_gives_our_logits_with_our_adapter(trained: tuple[Path, Path]) -> None:
    base, adapter = trained
    model = in_float32(PeftModel.from_pretrained(theirs(base), adapter / "final"))
    ids = some_ids(2, 31)
    with torch.inference_mode():
        got, wanted = ours(base, adapter=adapter)(ids), model(ids).logits
        assert largest_difference(got, wanted) <= 1e-4
        assert largest_difference(got, ours(base)(ids)) > 0.1, "an adapter that changes so little hides differences"


def test_peft_reads_every_tensor_of_our_adapter_and_writes_it_back(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    final = adapter / "final"
    model = PeftModel.from_pretrained(theirs(base), final)
    ours_saved = load_file(final / "adapter_model.safetensors")
    read = peft.get_peft_model_state_dict(model)
    assert read.keys() == ours_saved.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in ours_saved.items())
    model.save_pretrained(tmp_path)
    again, first = AdapterFolder.open(tmp_path), AdapterFolder.open(final)
    assert all(
        torch.equal(x, y) for path in first.pairs for x, y in zip(first.pairs[path], again.pairs[path], strict=True)
    )
    assert {first.config.scale(path) for path in first.modules} == {again.config.scale(path) for path in again.modules}


@pytest.mark.parametrize("init", ["loftq", "loftq:3"])
@pytest.mark.parametrize("model", ["tiny", "real"])
def test_peft_loads_an_adapter_to_start_from_and_gives_our_logits(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, init: str
) -> None:
    if model == "real":
        source = request.getfixturevalue("shared_data") / "models" / "stories260K"
    else:
        source = tiny_checkpoint(tmp_path / "source", hidden_size=68, head_dim=6, intermediate_size=173, mlp_bias=True)
    store, adapter = tmp_path / "store", tmp_path / "store-loftq"
    run("quantize", source, store, "--adapter-init", init, "--adapter-rank", 7)
    on_4_bits = in_float32(PeftModel.from_pretrained(theirs(store), adapter))
    on_dense = PeftModel.from_pretrained(plain_model(store, our_weights(store, dtype=torch.float32)), adapter)
    ids = some_ids(2, 31)
    with torch.inference_mode():
        got = ours(store, adapter=adapter)(ids)
        assert largest_difference(got, on_4_bits(ids).logits) <= 1e-4
        assert largest_difference(got, on_dense(ids).logits) <= 1e-4
        assert largest_difference(got, ours(store)(ids)) > 0.01, "an adapter that changes so little hides differences"
    saved, read = load_file(adapter / "adapter_model.safetensors"), peft.get_peft_model_state_dict(on_dense)
    assert read.keys() == saved.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("name", ["all-r8", "qv-r4-rslora"])
def test_an_adapter_that_peft_trained_gives_its_reference_logits(shared_data: Path, name: str) -> None:
    base, adapter = shared_data / "models" / "stories260K", shared_data / "interop" / f"stories260K-lora-{name}"
    reference = load_file(adapter / "reference_logits.safetensors")
    ids = reference["input_ids"]
    with torch.inference_mode():
        assert largest_difference(ours(base)(ids), reference["logits_base"]) <= 1e-4
        assert largest_difference(ours(base, adapter=adapter)(ids), reference["logits_adapter"]) <= 1e-4


@pytest.mark.parametrize("seed", range(10))
def test_a_random_adapter_of_peft_gives_its_logits(tmp_path: Path, seed: int) -> None:
    base = tiny_checkpoint(tmp_path / "base", seed=seed, attention_bias=True, num_hidden_layers=3)
    theirs_adapted = random_adapter(base, tmp_path / "adapter", seed=seed)
    ids = some_ids(2, 29)
    with torch.inference_mode():
        got, wanted = ours(base, adapter=tmp_path / "adapter")(ids), theirs_adapted(ids).logits
        assert largest_difference(got, ours(base)(ids)) > 0.05
    assert largest_difference(got, wanted) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.layers\.[02]\.mlp\.(up|down)_proj"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": PROJECTIONS, "layers_to_transform": [1]},
        {"target_modules": PROJECTIONS, "exclude_modules": ["k_proj"]},
        {"rank_pattern": {".*_proj": 2, "down_proj": 5}, "target_modules": PROJECTIONS},
        {"rank_pattern": {"down_proj": 5, "proj": 2}, "alpha_pattern": {"down": 3, "mlp.down_proj": 9}},
    ],
    ids=str,
)
def test_each_way_to_name_modules_gives_the_logits_of_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = tiny_checkpoint(tmp_path / "base", num_hidden_layers=3)
    theirs_adapted = random_adapter(base, tmp_path / "adapter", seed=3, **settings)
    ids = some_ids(2, 29)
    with torch.inference_mode():
        got, wanted = ours(base, adapter=tmp_path / "adapter")(ids), theirs_adapted(ids).logits
        assert largest_difference(got, ours(base)(ids)) > 0.05
    assert largest_difference(got, wanted) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_that_peft_saved_in_16_bits_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False),
        autocast_adapter_dtype=False,
    )
    model.to(dtype).save_pretrained(tmp_path / "adapter")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {
        dtype
    }
    again = PeftModel.from_pretrained(theirs(base), tmp_path / "adapter")
    ids = some_ids(2, 29)
    with torch.inference_mode():
        got, wanted = ours(base, adapter=tmp_path / "adapter")(ids), again(ids).logits
    assert largest_difference(got, wanted) <= 1e-5 * float(wanted.abs().max())


def test_training_goes_on_from_an_adapter_of_peft_and_peft_reads_the_result(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    settings = {
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {"layers.1.mlp.down_proj": 5},
        "target_modules": ["q_proj", "down_proj"],
    }
    random_adapter(base, tmp_path / "adapter", seed=1, **settings)
    (tmp_path / "text.txt").write_text("the fox and the hen and the fox\n" * 60)
    run(
        "finetune", base, "--data", f"text:{tmp_path / 'text.txt'}", "--out", tmp_path / "run", "--steps", 3,
        "--adapter", tmp_path / "adapter", "--learning-rate", 1e-2, "--batch-size", 2, "--max-tokens", 40,
    )  # fmt: skip
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", tmp_path / "run" / "final")
    )
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    ids = some_ids(2, 29)
    with torch.inference_mode():
        got = ours(base, adapter=tmp_path / "run")(ids)
        wanted = PeftModel.from_pretrained(theirs(base), tmp_path / "run" / "final")(ids).logits
    assert largest_difference(got, wanted) <= 1e-5 * float(wanted.abs().max())
