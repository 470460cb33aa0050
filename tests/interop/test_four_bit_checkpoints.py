"""4-bit weights of any shape and setting, both ways: what bitsandbytes packs we read, and what we write it reads.

Published checkpoints too: each weight of theirs bit for bit, their key maps, and the whole chain from them.
"""

import json
import random
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from qlora_formats.commit import commit_folder
from qlora_formats.layout import StorePlan
from qlora_formats.store import Store, StoredWeight
from qlora_formats.store_writing import quantization_config, write_store
from qlora_kernels import BLOCK_SIZES, quantize
from qlora_kernels.dispatch import dequantize
from qlora_kernels.levels import levels_of
from qlora_pipe.nn.linear import quantized_tensor
from tests.interop.peers import (
    dequantized_by_the_peer,
    in_float32,
    our_weights,
    ours,
    run,
    some_ids,
    their_weights,
    theirs,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 300))
PROPERTIES = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SETTINGS: dict[str, Any] = {
    "kind": st.sampled_from(["nf4", "fp4"]),
    "block_size": st.sampled_from(BLOCK_SIZES),
    "double_quant": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
}


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random weights; some seeds leave blocks of zeros at the front."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 5 - 3)
    weight.view(-1)[: weight.numel() * (seed % 3) // 4] = 0
    return weight.to(dtype)


def save_as_theirs(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, shards: Sequence[Sequence[str]] = ()
) -> Path:
    """A folder as transformers saves it, its tensors in one file or in the given shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": config}))
    if not shards:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def their_config(*, kind: str, double_quant: bool, storage: torch.dtype) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_quant_storage": str(storage).removeprefix("torch."),
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": None,
    }


def assert_read_as_they_dequantize(store: Store, name: str, packed: Tensor, state: Any) -> None:
    stored = store.weight(name)
    assert isinstance(stored, StoredWeight)
    assert (stored.kind, stored.dtype, stored.shape) == (state.quant_type, state.dtype, tuple(state.shape))
    for dtype in (state.dtype, torch.float32):
        wanted = dequantized_by_the_peer(packed, state, dtype=dtype)
        got = dequantize(quantized_tensor(stored, name=name), dtype)
        assert torch.equal(got.view(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))


@PROPERTIES
@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    storage=st.sampled_from(STORAGES),
    in_shards=st.booleans(),
    **SETTINGS,
)
def test_what_bitsandbytes_packs_is_read_to_the_bits_that_it_dequantizes(
    tmp_path: Path,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    storage: torch.dtype,
    in_shards: bool,
    kind: str,
    block_size: int,
    double_quant: bool,
    seed: int,
) -> None:
    # It packs into another type only what fills it.
    assume(-(-prod(shape) // 2) % storage.itemsize == 0)
    with torch.compiler.set_stance("force_eager"):
        packed, state = quantize_4bit(
            drawn(shape, dtype, seed),
            blocksize=block_size,
            quant_type=kind,
            compress_statistics=double_quant,
            quant_storage=storage,
        )
    parts = {f"w.weight.{part}": value for part, value in state.as_dict(packed=True).items()}
    tensors = {"w.weight": packed, **parts, "norm.weight": torch.ones(3)}
    shards: list[list[str]] = [[], [], []]
    for name in sorted(tensors):
        random.Random(f"{name} {seed}").choice(shards).append(name)
    folder = save_as_theirs(
        tmp_path / f"{shape} {dtype} {storage} {in_shards} {kind} {block_size} {double_quant} {seed}",
        tensors,
        their_config(kind=kind, double_quant=double_quant, storage=storage),
        shards=[names for names in shards if names] if in_shards else (),
    )
    store = Store.open(folder)
    assert sorted(store.names) == ["norm.weight", "w.weight"]
    assert_read_as_they_dequantize(store, "w.weight", packed, state)


@PROPERTIES
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    shard_mib=st.sampled_from([0, 4096]),
    **SETTINGS,
)
def test_what_we_write_bitsandbytes_reads_to_the_bits_that_we_dequantize(
    tmp_path: Path,
    *,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    shard_mib: int,
    kind: Any,
    block_size: int,
    double_quant: bool,
    seed: int,
) -> None:
    weights = {f"blocks.{number}.w.weight": drawn(shape, dtype, seed + number) for number, shape in enumerate(shapes)}
    weights["norm.weight"] = torch.ones(5, dtype=dtype)
    plan = StorePlan.of(
        [(name, weight.dtype, tuple(weight.shape)) for name, weight in weights.items()],
        block_of=lambda name: name.removesuffix("w.weight") if name.startswith("blocks.") else None,
        is_quantized=lambda name: name.startswith("blocks."),
        kind=kind,
        block_size=block_size,
        double_quant=double_quant,
        skip_modules=["norm"],
    )
    packed = {
        name: quantize(weight, kind=kind, block_size=block_size, double_quant=double_quant)
        for name, weight in weights.items()
        if name.startswith("blocks.")
    }

    def produce(name: str) -> StoredWeight | Tensor:
        if name not in packed:
            return weights[name]
        return StoredWeight(**packed[name]._asdict(), kind=kind, dtype=dtype)

    folder = tmp_path / f"{shapes} {dtype} {shard_mib} {kind} {block_size} {double_quant} {seed}"
    with commit_folder(folder, kind="store", inputs={}) as work:
        write_store(work, config={}, plan=plan, produce=produce, shard_mib=shard_mib)
        work.finish()
    tensors = tensors_of(folder)
    for name, q in packed.items():
        their_state = state_of(name, tensors)
        wanted = dequantized_by_the_peer(tensors[name], their_state)
        assert (wanted.dtype, tuple(wanted.shape)) == (dtype, tuple(weights[name].shape))
        assert torch.equal(wanted.view(-1).view(torch.uint8), dequantize(q, dtype).view(-1).view(torch.uint8))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def state_of(name: str, tensors: Mapping[str, Tensor]) -> QuantState:
    """What bitsandbytes makes of the tensors beside a weight."""
    parts = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    return QuantState.from_dict(parts, device=torch.device("cpu"))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_state_of_a_layer_of_bitsandbytes_is_a_store(
    tmp_path: Path, dtype: torch.dtype, storage: torch.dtype
) -> None:
    layer = Linear4bit(48, 40, bias=True, quant_type="nf4", compress_statistics=True, quant_storage=storage)
    layer.weight = Params4bit(drawn((40, 48), dtype, 3), requires_grad=False, quant_type="nf4", quant_storage=storage)
    with torch.compiler.set_stance("force_eager"):
        layer.to("cpu")
    saved = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    assert saved["layer.weight"].dtype == storage
    config = their_config(kind="nf4", double_quant=True, storage=storage)
    store = Store.open(save_as_theirs(tmp_path / "x", saved, config))
    assert sorted(store.names) == ["layer.bias", "layer.weight"]
    assert_read_as_they_dequantize(store, "layer.weight", layer.weight.data, layer.weight.quant_state)


PUBLISHED = {
    "stories260K-bnb-nf4-dq": 35,
    "stories260K-bnb-nf4-dq-bf16": 35,
    "stories260K-bnb-fp4": 35,
    "t5-stories-280k-bnb-nf4-dq": 32,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_weight_of_a_published_checkpoint_has_the_bits_that_its_publisher_dequantized(
    shared_data: Path, name: str
) -> None:
    folder = shared_data / "interop" / name
    reference = load_file(folder / "reference_dequant.safetensors")
    wanted = {key: tensor for key, tensor in reference.items() if key.endswith(".weight")}
    store, tensors, dense = Store.open(folder), tensors_of_model(folder), our_weights(folder)
    quantized = [weight for weight in store.names if store.is_quantized(weight)]
    assert len(quantized) == PUBLISHED[name]
    assert len(wanted) >= 4
    assert wanted.keys() <= set(quantized)
    assert all(torch.equal(dense[weight].float(), tensor) for weight, tensor in wanted.items())
    for weight in quantized:
        assert_read_as_they_dequantize(store, weight, tensors[weight], state_of(weight, tensors))


def tensors_of_model(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("stories")])
def test_a_published_checkpoint_is_a_base_to_fine_tune_merge_and_generate_from(
    shared_data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shared_data / "interop" / name
    (tmp_path / "text.txt").write_text("Once upon a time there was a very small fox. It had a red ball.\n" * 40)
    run(
        "finetune", base, "--data", f"text:{tmp_path / 'text.txt'}", "--out", tmp_path / "run", "--steps", 2,
        "--learning-rate", 2e-2, "--batch-size", 2, "--max-tokens", 48, "--rank", 4,
    )  # fmt: skip
    run("merge", base, tmp_path / "run", tmp_path / "merged", "--dtype", "float32")
    ids = some_ids(2, 31, below=512)
    with torch.inference_mode():
        tuned = ours(base, adapter=tmp_path / "run")(ids)
        assert (tuned - ours(base)(ids)).abs().max() > 0.1
        assert (theirs(tmp_path / "merged")(ids).logits - tuned).abs().max() <= 1e-4
        adapted = in_float32(PeftModel.from_pretrained(theirs(base), tmp_path / "run" / "final"))
        assert (adapted(ids).logits - tuned).abs().max() <= 1e-4
    said = []
    for words in (["generate", base, "--adapter", tmp_path / "run"], ["generate", tmp_path / "merged"]):
        capsys.readouterr()
        run(*words, "--prompt", "Once upon a time", "--max-new-tokens", 20, "--dtype", "float32")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != "\n"


@pytest.mark.parametrize("name", ["all-r8", "qv-r4-rslora"])
def test_peft_puts_a_published_adapter_on_our_store_as_we_do(shared_data: Path, tmp_path: Path, name: str) -> None:
    run("quantize", shared_data / "models" / "stories260K", tmp_path / "store")
    adapter = shared_data / "interop" / f"stories260K-lora-{name}"
    ids = load_file(adapter / "reference_logits.safetensors")["input_ids"]
    with torch.inference_mode():
        model = in_float32(PeftModel.from_pretrained(theirs(tmp_path / "store"), adapter))
        got = ours(tmp_path / "store", adapter=adapter)(ids)
        assert (got - model(ids).logits).abs().max() <= 1e-4
        assert (got - ours(tmp_path / "store")(ids)).abs().max() > 0.1


@pytest.mark.parametrize("n_shards", [2, 7])
@pytest.mark.parametrize("seed", range(3))
def test_a_published_checkpoint_whose_weights_parts_lie_in_different_shards_is_read(
    shared_data: Path, tmp_path: Path, n_shards: int, seed: int
) -> None:
    source = shared_data / "interop" / "stories260K-bnb-nf4-dq"
    tensors = tensors_of_model(source)
    names = sorted(tensors)
    random.Random(seed).shuffle(names)
    config = json.loads((source / "config.json").read_text())
    shards = [sorted(names[start::n_shards]) for start in range(n_shards)]
    folder = save_as_theirs(tmp_path / "x", tensors, config["quantization_config"], shards=shards)
    (folder / "config.json").write_text(json.dumps(config))
    whole, split = Store.open(source), Store.open(folder)
    assert sorted(whole.names) == sorted(split.names)
    one, other = our_weights(source), our_weights(folder)
    assert all(torch.equal(one[name], other[name]) for name in whole.names)
    wanted = their_weights(theirs(folder))
    assert all(torch.equal(other[name], wanted[name]) for name in wanted)


def test_a_checkpoint_that_transformers_split_into_small_files_is_read(shared_data: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    source = shared_data / "models" / "stories260K"
    with torch.compiler.set_stance("force_eager"):
        model = LlamaForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "split", max_shard_size="12KB")
    weight_map = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(is_split(name, weight_map) for name in weight_map), "no weight lies in two files: nothing is tested"
    one, other = our_weights(tmp_path / "whole"), our_weights(tmp_path / "split")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def is_split(name: str, weight_map: Mapping[str, str]) -> bool:
    return len({file for key, file in weight_map.items() if key == name or key.startswith(f"{name}.")}) > 1


def test_the_keys_of_a_published_model_of_another_family_make_a_store(shared_data: Path, tmp_path: Path) -> None:
    published = shared_data / "interop" / "real_world"
    index = json.loads((published / "molmo7b_bnb_nf4.model.safetensors.index.json").read_text())
    config = json.loads((published / "molmo7b_bnb_nf4.config.json").read_text())
    weight_map: dict[str, str] = index["weight_map"]
    state = ".quant_state.bitsandbytes__nf4"
    packed = {name.removesuffix(state) for name in weight_map if name.endswith(state)}
    assert len(packed) == 112
    # Shapes are not in the index; small ones of the same kinds stand for them.
    shape_of = {name: (24, 40) if "ff_out" in name else (40, 24) for name in packed}
    made = {
        "": lambda name: torch.full((480, 1), 0x77, dtype=torch.uint8),
        ".absmax": lambda name: torch.ones(15),
        ".quant_map": lambda name: levels_of("nf4"),
        state: lambda name: as_json(
            {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": shape_of[name]}
        ),
    }
    tensors = {f"{name}{part}": make(name) for name in packed for part, make in made.items()}
    tensors |= {name: torch.zeros(24, dtype=torch.float16) for name in weight_map if name not in tensors}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in weight_map if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    # The total that it states is that of the real shapes, and nothing depends on it.
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    store = Store.open(tmp_path)
    assert {name for name in store.names if store.is_quantized(name)} == packed
    assert len(store.names) == len(weight_map) - 3 * len(packed)
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    assert not any(name.startswith(tuple(f"{module}." for module in skipped)) for name in packed)
    for name in packed:
        weight = store.weight(name)
        assert isinstance(weight, StoredWeight)
        assert torch.equal(
            dequantize(quantized_tensor(weight, name=name), torch.float16), torch.zeros(shape_of[name]).half()
        )


def as_json(fields: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


# What vLLM's loader of bitsandbytes checkpoints is known to need, read from its documentation and sources in 2025; it
# does not run on a machine without an accelerator and is not among the peers that are installed for these tests.
PART_MARKS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes")


@pytest.mark.parametrize("flags", [[], ["--type", "fp4"], ["--no-double-quant"], ["--shard-mib", "1"]], ids=" ".join)
def test_our_store_has_the_keys_and_the_config_that_vllm_needs(
    shared_data: Path, tmp_path: Path, flags: list[str]
) -> None:
    store = tmp_path / "store"
    run("quantize", shared_data / "models" / "stories260K", store, *flags)
    config = json.loads((store / "config.json").read_text())
    known = config["quantization_config"]

    # It chooses its method and its loader by these fields, and takes no other storage than this.
    assert known["quant_method"] == "bitsandbytes"
    assert (known["load_in_4bit"], known["load_in_8bit"]) == (True, False)
    assert known["bnb_4bit_quant_storage"] == "uint8"
    assert known["bnb_4bit_quant_type"] in ("nf4", "fp4")
    assert known["bnb_4bit_compute_dtype"] in ("float32", "bfloat16", "float16")
    assert type(known["bnb_4bit_use_double_quant"]) is bool
    assert known["llm_int8_skip_modules"] == ["lm_head"]

    # It takes every *.safetensors of the folder, or those that the index names.
    files = sorted(store.glob("*.safetensors"))
    if len(files) > 1:
        index = json.loads((store / "model.safetensors.index.json").read_text())
        assert {path.name for path in files} == set(index["weight_map"].values())

    # A tensor counts as a part of a weight by the last word of its name, and as a weight otherwise.
    tensors = tensors_of(store)
    weights = [name for name in tensors if not any(mark in name.rpartition(".")[2] for mark in PART_MARKS)]
    state = f".quant_state.bitsandbytes__{known['bnb_4bit_quant_type']}"
    packed = [name for name in weights if f"{name}{state}" in tensors]
    assert len(packed) == 35
    assert len(weights) == 35 + 12
    for name in packed:
        # All parts whose names contain the weight's go to bitsandbytes, which refuses any that it does not know.
        parts = {key: tensor for key, tensor in tensors.items() if f"{name}." in key}
        assert all(key.startswith(f"{name}.") for key in parts)
        found = QuantState.from_dict(dict(parts), device=torch.device("cpu"))
        assert tensors[name].dtype == torch.uint8
        assert list(tensors[name].shape) == [prod(found.shape) // 2, 1]
        assert found.quant_type == known["bnb_4bit_quant_type"]
        assert found.nested == known["bnb_4bit_use_double_quant"]
    # Every linear layer that is not skipped by a component or a prefix of its path must be in 4 bits.
    linears = [name for name in weights if name.endswith("_proj.weight") or name == "lm_head.weight"]
    assert {name for name in linears if "lm_head" not in name} == set(packed)
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_the_config_of_a_store_has_the_fields_that_the_peers_config_has(tmp_path: Path) -> None:
    plan = StorePlan.of(
        [("w", torch.bfloat16, (4, 4))],
        block_of=lambda name: None,
        is_quantized=lambda name: True,
        kind="nf4",
        block_size=64,
        double_quant=True,
        skip_modules=["lm_head"],
    )
    written = quantization_config(plan)
    assert BitsAndBytesConfig.from_dict(written).to_dict() == written
