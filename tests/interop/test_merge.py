"""Merged checkpoints against the peers: transformers loads them, and what they hold is what PEFT would merge."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from qlora_formats.adapter import AdapterFolder
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.testing import tiny_checkpoint
from tests.interop.peers import ODD_MODELS, our_weights, ours, plain_model, run, some_ids, their_weights, theirs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def adapter_on(base: Path, out: Path, *, modules: list[str], rank: int = 4) -> Path:
    """An adapter that PEFT makes and saves; it changes some layers by about a tenth, and leaves the others alone."""
    torch.manual_seed(rank)
    config = LoraConfig(r=rank, lora_alpha=3, use_rslora=True, target_modules=modules, init_lora_weights=False)
    get_peft_model(theirs(base), config).save_pretrained(out)
    return out


def dense_weights(base: Path) -> dict[str, Tensor]:
    """The base's weights in float32, 4-bit ones as bitsandbytes dequantises them."""
    kept = {name: tensor.float() for name, tensor in our_weights(base).items()}
    return {**kept, **their_weights(theirs(base), dtype=torch.float32)}


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(plain_model(base, dense_weights(base)), adapter).merge_and_unload()
    return dict(model.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_what_peft_merges_rounded_once(trained: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    base, adapter = trained
    run("merge", base, adapter, tmp_path / "merged", "--dtype", dtype, "--min-retention", 0)
    got, wanted = tensors_of(tmp_path / "merged"), merged_by_peft(base, adapter / "final")
    before = dense_weights(base)
    assert got.keys() == before.keys()
    for name, tensor in got.items():
        assert tensor.dtype == DTYPES[dtype]
        assert torch.equal(tensor, wanted[name].to(DTYPES[dtype])), name
    adapted = {f"{path}.weight" for path in AdapterFolder.open(adapter / "final").modules}
    assert {name for name in got if not torch.equal(got[name], before[name].to(DTYPES[dtype]))} == adapted


def test_a_float32_merge_gives_the_logits_of_the_adapter_on_its_base(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = trained
    run("merge", base, adapter, tmp_path / "merged", "--dtype", "float32")
    ids = some_ids(3, 33)
    with torch.inference_mode():
        unmerged, merged = ours(base, adapter=adapter)(ids), theirs(tmp_path / "merged")(ids).logits
        assert (merged - unmerged).abs().max() <= 1e-4
        assert (ours(tmp_path / "merged")(ids) - unmerged).abs().max() <= 1e-4
        assert (ours(base)(ids) - unmerged).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ODD_MODELS)
def test_odd_widths_and_types_are_merged_as_peft_merges_them(tmp_path: Path, model: str, dtype: str) -> None:
    source = tiny_checkpoint(tmp_path / "source", **ODD_MODELS[model])
    adapter = adapter_on(source, tmp_path / "adapter", modules=["v_proj", "o_proj", "down_proj"])
    run("quantize", source, tmp_path / "store")
    for base in (source, tmp_path / "store"):
        merged = tmp_path / f"merged {base.name}"
        run("merge", base, adapter, merged, "--dtype", dtype, "--min-retention", 0)
        got, wanted = tensors_of(merged), merged_by_peft(base, adapter)
        assert got.keys() == tensors_of(source).keys()
        assert all(torch.equal(tensor, wanted[name].to(DTYPES[dtype])) for name, tensor in got.items())


def test_transformers_loads_a_merged_folder_and_its_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    source, store, merged = shared_data / "models" / "stories260K", tmp_path / "store", tmp_path / "merged"
    run("quantize", source, store)
    run("merge", store, shared_data / "interop" / "stories260K-lora-all-r8", merged)
    model = theirs(merged)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    # A tied head stays tied: it is in no file, and shares the embedding's memory.
    assert "lm_head.weight" not in tensors_of(merged)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.model.embed_tokens.weight, tensors_of(source)["model.embed_tokens.weight"].bfloat16())
    text = "Once upon a time, there was a dragon."
    tokenizer, before = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(source)
    assert tokenizer(text).input_ids == before(text).input_ids == [1, *Tokenizer.open(merged).encode(text)[0]]
    assert (merged / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_in_several_files_is_loaded(tmp_path: Path, tied: bool) -> None:
    source = tiny_checkpoint(
        tmp_path / "source",
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
    )
    store, merged = tmp_path / "store", tmp_path / "merged"
    run("quantize", source, store)
    adapter = adapter_on(source, tmp_path / "adapter", modules=["q_proj", "down_proj"])
    run("merge", store, adapter, merged, "--dtype", "float32", "--shard-mib", 1)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in merged.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert len(shards) >= 2
    ids = some_ids(1, 33)
    with torch.inference_mode():
        unmerged = ours(store, adapter=adapter)(ids)
        assert (theirs(merged)(ids).logits - unmerged).abs().max() <= 1e-4
