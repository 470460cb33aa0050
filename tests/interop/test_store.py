"""The 4-bit store against transformers and bitsandbytes: the same bytes, and each side reads what the other wrote."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from qlora_pipe.artifacts import open_model
from qlora_pipe.testing import tiny_checkpoint
from tests.interop.peers import (
    ODD_MODELS,
    in_float32,
    our_weights,
    ours,
    plain_model,
    run,
    some_ids,
    their_weights,
    theirs,
)

FLAGS = [
    [],
    ["--type", "fp4"],
    ["--no-double-quant"],
    ["--type", "fp4", "--no-double-quant", "--block-size", "128"],
    ["--block-size", "32"],
    ["--block-size", "4096"],
]


@pytest.fixture
def _several_threads() -> Iterator[None]:
    """What the store holds must not depend on the threads it is made with; the peer's does, and is made with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def as_the_peer_stores(name: str, weight: torch.Tensor, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes' Linear4bit saves for one weight, quantised at one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        codes, state = bitsandbytes.functional.quantize_4bit(
            weight,
            blocksize=settings["block_size"],
            quant_type=settings["type"],
            compress_statistics=settings["double_quant"],
        )
    torch.set_num_threads(threads)
    return {name: codes, **{f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}}


def assert_the_peers_bytes(source: Path, store: Path) -> None:
    settings = json.loads((store / "qlora_pipe.json").read_text())["inputs"]["settings"]
    got, wanted = tensors_of(store), tensors_of(source)
    packed = [name for name in wanted if "_proj.weight" in name]
    assert packed
    for name in packed:
        wanted |= as_the_peer_stores(name, wanted[name], settings)
    assert_same_tensors(got, wanted)


def assert_same_tensors(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Compare two stores bit by bit, but for the spaces behind the JSON of ours."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if ".quant_state." in name:
            assert got[name].numpy().tobytes().rstrip(b" ") == tensor.numpy().tobytes(), name
        else:
            assert got[name].dtype == tensor.dtype, name
            assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_same_model(source: Path, store: Path, ids: torch.Tensor) -> None:
    model = theirs(store)
    got, wanted = our_weights(store), their_weights(model)
    assert set(wanted) == {name for name in got if "_proj.weight" in name}
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    dense = {**tensors_of(source), **their_weights(model, dtype=torch.float32)}
    with torch.inference_mode():
        logits = ours(store)(ids)
        assert (logits - plain_model(store, dense)(ids).logits).abs().max() <= 1e-4
        # The bound means something only if the 16-bit model lies outside of it.
        assert (logits - plain_model(source, tensors_of(source))(ids).logits).abs().max() > 0.05


@pytest.mark.usefixtures("_several_threads")
@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_a_real_model_is_stored_in_the_peers_bytes(shared_data: Path, tmp_path: Path, flags: list[str]) -> None:
    source = shared_data / "models" / "stories260K"
    run("quantize", source, tmp_path / "store", *flags)
    assert_the_peers_bytes(source, tmp_path / "store")


@pytest.mark.usefixtures("_several_threads")
@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
@pytest.mark.parametrize("model", ODD_MODELS)
def test_models_of_odd_widths_are_stored_in_the_peers_bytes(tmp_path: Path, model: str, flags: list[str]) -> None:
    source = tiny_checkpoint(tmp_path / "source", seed=len(model), **ODD_MODELS[model])
    run("quantize", source, tmp_path / "store", *flags)
    assert_the_peers_bytes(source, tmp_path / "store")


@pytest.mark.usefixtures("_several_threads")
def test_weights_of_more_than_2_1_million_elements_are_stored_in_the_peers_bytes(tmp_path: Path) -> None:
    source = tiny_checkpoint(
        tmp_path / "source",
        hidden_size=1026,
        intermediate_size=2101,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        dtype=torch.bfloat16,
    )
    run("quantize", source, tmp_path / "store")
    assert_the_peers_bytes(source, tmp_path / "store")


@pytest.mark.parametrize("keep", [["down_proj"], ["layers.1"], ["layers.1.mlp.up_proj", "self_attn.*_proj"]], ids=str)
def test_transformers_reads_a_store_with_weights_kept_in_16_bits(tmp_path: Path, keep: list[str]) -> None:
    # Twelve layers: the name of layer 1 begins those of 10 and 11.
    source = tiny_checkpoint(tmp_path / "source", num_hidden_layers=12, hidden_size=64, intermediate_size=96)
    run("quantize", source, tmp_path / "store", *(word for pattern in keep for word in ("--keep", pattern)))
    kept = json.loads((tmp_path / "store" / "qlora_pipe.json").read_text())["inputs"]["kept"]
    model = theirs(tmp_path / "store")
    got, wanted = our_weights(tmp_path / "store"), their_weights(model)
    assert set(wanted) == {name for name in got if "_proj.weight" in name} - set(kept)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert all(torch.equal(got[name], model.get_parameter(name)) for name in kept)


@pytest.mark.parametrize("flags", FLAGS[::3] + FLAGS[-1:], ids=" ".join)
@pytest.mark.parametrize("model", ODD_MODELS)
def test_transformers_reads_stores_of_odd_widths_as_we_do(tmp_path: Path, model: str, flags: list[str]) -> None:
    source = tiny_checkpoint(tmp_path / "source", seed=len(model), **ODD_MODELS[model])
    run("quantize", source, tmp_path / "store", *flags)
    assert_same_model(source, tmp_path / "store", some_ids(2, 37))


@pytest.mark.parametrize("flags", FLAGS[::3] + FLAGS[-1:], ids=" ".join)
def test_transformers_reads_the_store_of_a_real_model_as_we_do(
    shared_data: Path, tmp_path: Path, flags: list[str]
) -> None:
    source, store = shared_data / "models" / "stories260K", tmp_path / "store"
    run("quantize", source, store, *flags)
    assert_same_model(source, store, some_ids(3, 90, below=512))


@pytest.mark.parametrize("flags", [[], ["--type", "fp4"], ["--no-double-quant"]], ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layers_of_bitsandbytes_give_our_logits(
    shared_data: Path, tmp_path: Path, dtype: torch.dtype, flags: list[str]
) -> None:
    # Widths that the peer's own code for any processor multiplies rightly.
    tiny = tiny_checkpoint(tmp_path / "source", dtype=dtype, hidden_size=64, intermediate_size=192, mlp_bias=True)
    for source in (tiny, shared_data / "models" / "stories260K"):
        store = tmp_path / f"store of {source.name}"
        run("quantize", source, store, *flags)
        ids = some_ids(2, 41)
        with torch.inference_mode():
            assert (ours(store)(ids) - in_float32(theirs(store))(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("flags", FLAGS[:2], ids=" ".join)
def test_transformers_continues_a_text_on_our_store_as_generate_does(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    store = tmp_path / "store"
    run("quantize", shared_data / "models" / "stories260K", store, *flags)
    capsys.readouterr()
    run("generate", store, "--prompt", "Once upon a time", "--max-new-tokens", "60")
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    prompt = tokenizer.encode("Once upon a time").ids
    ids = in_float32(theirs(store)).generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0].tolist()
    assert len(ids) == len(prompt) + 60
    assert f"Once upon a time{capsys.readouterr().out.removesuffix(chr(10))}" == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["nf4-dq", "fp4", "nf4-dq-bf16"])
def test_stores_that_transformers_wrote_are_read_as_it_reads_them(shared_data: Path, name: str) -> None:
    folder = shared_data / "interop" / f"stories260K-bnb-{name}"
    reference = load_file(folder / "reference_dequant.safetensors")
    logits = reference.pop("logits_once_upon_a_time")
    dense = our_weights(folder)
    assert len(reference) == 4
    for weight, wanted in reference.items():
        assert torch.equal(dense[weight].float(), wanted)
    model = theirs(folder)
    wanted_weights = their_weights(model)
    assert len(wanted_weights) == 35
    assert all(torch.equal(dense[weight], wanted) for weight, wanted in wanted_weights.items())
    ids = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Once upon a time").ids])
    with torch.inference_mode():
        got = ours(folder)(ids)
        assert (got - in_float32(model)(ids).logits).abs().max() <= 1e-4
        if open_model(folder).config["dtype"] == "float32":
            assert (got - logits).abs().max() <= 1e-4


def stored_by_transformers(source: Path, out: Path, **settings: Any) -> Path:
    """Let transformers quantise a checkpoint and save it."""
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    with torch.compiler.set_stance("force_eager"):
        model = LlamaForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto")
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        (["--type", "fp4", "--no-double-quant"], {"bnb_4bit_quant_type": "fp4"}),
    ],
    ids=["nf4 double", "fp4"],
)
@pytest.mark.parametrize("model", ODD_MODELS)
def test_transformers_writes_the_store_that_we_write(
    tmp_path: Path, model: str, flags: list[str], settings: dict[str, Any]
) -> None:
    source, mine = tiny_checkpoint(tmp_path / "source", seed=3, **ODD_MODELS[model]), tmp_path / "ours"
    dtype = ODD_MODELS[model].get("dtype", torch.float32)
    compute = {"bnb_4bit_compute_dtype": torch.float32 if dtype == torch.float32 else torch.bfloat16}
    run("quantize", source, mine, *flags)
    peers = stored_by_transformers(source, tmp_path / "theirs", **settings, **compute)
    assert_same_tensors(tensors_of(mine), tensors_of(peers))
    ours_config, theirs_config = (
        json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (mine, peers)
    )
    # It finds the head by itself, and so names nothing to skip; ours says it.
    assert ours_config == {**theirs_config, "llm_int8_skip_modules": ["lm_head"]}
    # Its files have another order of tensors, biases before weights for one; they give the same model.
    ids = some_ids(2, 19)
    with torch.inference_mode():
        assert torch.equal(ours(peers)(ids), ours(mine)(ids))


def test_packed_bytes_that_the_peer_stores_as_another_type_are_read(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", hidden_size=72, intermediate_size=174)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    plain = stored_by_transformers(source, tmp_path / "plain", **settings)
    other = stored_by_transformers(source, tmp_path / "other", **settings, bnb_4bit_quant_storage=torch.bfloat16)
    assert tensors_of(other)["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    ids = some_ids(2, 19)
    with torch.inference_mode():
        assert torch.equal(ours(other)(ids), ours(plain)(ids))


@pytest.mark.parametrize("tied", [True, False])
def test_a_store_in_several_files_is_read_by_transformers(tmp_path: Path, tied: bool) -> None:
    source = tiny_checkpoint(
        tmp_path / "source",
        hidden_size=256,
        intermediate_size=689,
        num_hidden_layers=5,
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
    )
    store = tmp_path / "store"
    run("quantize", source, store, "--shard-mib", 1)
    assert len(list(store.glob("model-*-of-*.safetensors"))) >= 3
    assert_the_peers_bytes(source, store)
    assert_same_model(source, store, some_ids(1, 23))
