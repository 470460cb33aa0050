"""Malformed model, store and adapter folders: each gives one sentence that names the file and what is wrong."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora_formats.adapter import AdapterFolder
from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.errors import FormatError
from qlora_formats.store import Store, is_store

Damage = Callable[[Path], object]
INDEX = "model.safetensors.index.json"


def fails(open_folder: Callable[[Path], object], path: Path, sentence: str) -> None:
    with pytest.raises(FormatError, match=re.escape(sentence)) as caught:
        open_folder(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def write(name: str, text: str | bytes) -> Damage:
    return lambda path: (path / name).write_bytes(text.encode() if isinstance(text, str) else text)


def remove(*names: str) -> Damage:
    def damage(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return damage


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(path: Path) -> None:
        value = json.loads((path / name).read_bytes())
        change(value)
        (path / name).write_text(json.dumps(value))

    return damage


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for n in (1, 2):
        name = f"model-0000{n}-of-00002.safetensors"
        save_file({f"layers.{n}.weight": torch.ones(n)}, path / name)
        weight_map[f"layers.{n}.weight"] = name
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}))
    return path


def place(tensor: str, name: object) -> Damage:
    return edit(INDEX, lambda index: index["weight_map"].update({tensor: name}))


def move_shard_out(path: Path) -> None:
    shard = path / "model-00001-of-00002.safetensors"
    shard.rename(path.parent / "elsewhere.safetensors")
    shard.symlink_to(path.parent / "elsewhere.safetensors")


MODELS: dict[str, tuple[Damage, str]] = {
    "no config": (remove("config.json"), "is not a model: it has no config.json"),
    "config empty": (write("config.json", ""), "config.json is not valid JSON"),
    "config cut off": (write("config.json", '{"a": 1'), "config.json is not valid JSON"),
    "config a list": (write("config.json", "[1]"), "config.json holds a JSON list where an object is needed"),
    "config null": (write("config.json", "null"), "config.json holds a JSON null where an object is needed"),
    "config of NaN": (write("config.json", '{"rope_theta": NaN}'), "NaN is not a JSON number"),
    "config of 1e999": (write("config.json", '{"rope_theta": 1e999}'), "1e999 is too large a number"),
    "config key twice": (write("config.json", '{"a": 1, "a": 2}'), "the key 'a' stands twice"),
    "config not UTF-8": (write("config.json", b'{"a": "\xff"}'), "config.json is not UTF-8 text (byte 7)"),
    "config deep": (write("config.json", '{"a":' * 99_999), "config.json is not valid JSON: it is nested too deeply"),
    "config half a pair": (write("config.json", '{"a": "\\udc00"}'), "holds half of a surrogate pair"),
    "generation config broken": (write("generation_config.json", "{,}"), "generation_config.json is not valid JSON"),
    "no index": (remove(INDEX), f"holds no weights: neither model.safetensors nor {INDEX}"),
    "index broken": (write(INDEX, "{"), f"{INDEX} is not valid JSON"),
    "index without a map": (write(INDEX, "{}"), f"{INDEX} has no weight_map from tensors to files"),
    "index of an empty map": (write(INDEX, '{"weight_map": {}}'), f"{INDEX} has no weight_map"),
    "map a list": (write(INDEX, '{"weight_map": []}'), f"{INDEX} has no weight_map"),
    "file name a number": (place("x", 3), f"{INDEX} places the tensor 'x' in '3', which is no file name"),
    "file in the folder above": (place("x", "../secret.safetensors"), "'../secret.safetensors', which is no file name"),
    "file by an absolute path": (place("x", "/etc/passwd"), "in '/etc/passwd', which is no file name"),
    "the folder itself": (place("x", "."), "in '.', which is no file name"),
    "file name of control bytes": (place("x", "a\u0000b"), r"in 'a\x00b', which is no file name"),
    "shard missing": (remove("model-00002-of-00002.safetensors"), "lacks the shard model-00002-of-00002.safetensors"),
    "shard a link out": (move_shard_out, "is a link that leads out of its folder"),
    "shard cut off": (
        lambda path: os.truncate(path / "model-00002-of-00002.safetensors", 70),
        "model-00002-of-00002.safetensors is cut off",
    ),
    "tensor the shard lacks": (
        place("ghost", "model-00001-of-00002.safetensors"),
        f"model-00001-of-00002.safetensors lacks the tensor 'ghost' that {INDEX} places there",
    ),
    "tensor the index lacks": (
        lambda path: save_file(
            {"extra": torch.ones(1), "layers.2.weight": torch.ones(2)}, path / "model-00002-of-00002.safetensors"
        ),
        f"holds the tensor 'extra', which {INDEX} places nowhere",
    ),
    "tensor in another shard": (
        lambda path: save_file(
            {"layers.1.weight": torch.ones(1), "layers.2.weight": torch.ones(2)},
            path / "model-00002-of-00002.safetensors",
        ),
        f"holds the tensor 'layers.1.weight', which {INDEX} places in model-00001-of-00002.safetensors",
    ),
    "only a pickle": (
        lambda path: [remove(INDEX)(path), write("pytorch_model.bin", b"\x80\x02")(path)],
        "its weights are pickles (pytorch_model.bin), and loading one can run code: convert them to safetensors,"
        " or quantize with --allow-pickle",
    ),
    "an adapter": (
        lambda path: [remove("config.json")(path), write("adapter_config.json", "{}")(path)],
        "it is an adapter, which is used together with its base model",
    ),
    "tokenizer a link out": (
        lambda path: (path / "tokenizer.json").symlink_to("/etc/hostname"),
        "tokenizer.json is a link that leads out of its folder",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_malformed_model_folder_gives_one_sentence(sharded: Path, case: str) -> None:
    damage, sentence = MODELS[case]
    CheckpointFolder.open(sharded)
    damage(sharded)
    fails(lambda path: CheckpointFolder.open(path).carried_files(), sharded, sentence)


@pytest.mark.parametrize("open_folder", [CheckpointFolder.open, Store.open, AdapterFolder.open, is_store])
def test_what_is_no_folder_gives_one_sentence(tmp_path: Path, open_folder: Callable[[Path], object]) -> None:
    fails(open_folder, tmp_path / "absent", "there is no folder")
    (tmp_path / "file").write_text("x")
    fails(open_folder, tmp_path / "file", "is a file where a folder is needed")
    (tmp_path / ".out.partial").mkdir()
    fails(open_folder, tmp_path / "out", "out is unfinished: rerun the command that was writing it")


STATE = "w.quant_state.bitsandbytes__nf4"
FIELDS = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "bfloat16",
    "shape": [9, 17],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 0.25,
}


def store_tensors() -> dict[str, torch.Tensor]:
    return {
        "w": torch.zeros(77, 1, dtype=torch.uint8),
        "w.absmax": torch.zeros(3, dtype=torch.uint8),
        "w.quant_map": torch.zeros(16),
        "w.nested_absmax": torch.zeros(1),
        "w.nested_quant_map": torch.zeros(256),
        STATE: state(),
        "kept": torch.zeros(3),
    }


def state(data: bytes | None = None, **changes: Any) -> torch.Tensor:
    fields = {key: value for key, value in {**FIELDS, **changes}.items() if value != "absent"}
    return torch.tensor(list(data or json.dumps(fields).encode()), dtype=torch.uint8)


def write_store_folder(path: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    path.mkdir()
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (path / "config.json").write_text(json.dumps(config))


STORES: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "JSON broken": ({STATE: state(b"{")}, "weight 'w': quant_state is not valid JSON"),
    "JSON a list": ({STATE: state(b"[]")}, "weight 'w': quant_state holds a JSON list"),
    "JSON not UTF-8": ({STATE: state(b"\xff\xff")}, "weight 'w': quant_state is not UTF-8"),
    "JSON too long": (
        {STATE: state(b"{" + b" " * 2**16)},
        "weight 'w': quant_state is no list of at most 65,536 bytes",
    ),
    "JSON of floats": ({STATE: torch.zeros(9)}, "weight 'w': quant_state is no list of at most 65,536 bytes (U8)"),
    "no type": ({STATE: state(quant_type="absent")}, "weight 'w': quant_state lacks quant_type"),
    "no block size": ({STATE: state(blocksize="absent")}, "weight 'w': quant_state lacks blocksize"),
    "no dtype": ({STATE: state(dtype="absent")}, "weight 'w': quant_state lacks dtype"),
    "no shape": ({STATE: state(shape="absent")}, "weight 'w': quant_state lacks shape"),
    "no nested block size": ({STATE: state(nested_blocksize="absent")}, "quant_state lacks nested_blocksize"),
    "no nested offset": ({STATE: state(nested_offset="absent")}, "quant_state lacks nested_offset"),
    "other type": ({STATE: state(quant_type="int4")}, """quant_state has quant_type "int4", named 'nf4'"""),
    "type of another name": ({STATE: state(quant_type="fp4")}, """quant_state has quant_type "fp4", named 'nf4'"""),
    "type nobody knows": (
        {STATE: None, "w.quant_state.bitsandbytes__af4": state(quant_type="af4")},
        """quant_state has quant_type "af4", named 'af4'""",
    ),
    "block size 0": ({STATE: state(blocksize=0)}, "quant_state has blocksize 0, which is no power of two"),
    "block size 48": ({STATE: state(blocksize=48)}, "quant_state has blocksize 48, which is no power of two"),
    "block size true": ({STATE: state(blocksize=True)}, "quant_state has blocksize true, which is no power of two"),
    "block size 2**40": ({STATE: state(blocksize=2**40)}, "quant_state has blocksize 1099511627776, which is no power"),
    "nested block size -1": ({STATE: state(nested_blocksize=-1)}, "quant_state has nested_blocksize -1"),
    "nested dtype": ({STATE: state(nested_dtype="float64")}, 'quant_state has nested_dtype "float64"; only float32'),
    "offset text": ({STATE: state(nested_offset="0.1")}, 'quant_state has nested_offset "0.1", which is no float32'),
    "offset too large": (
        {STATE: state(nested_offset=1e39)},
        "quant_state has nested_offset 1e+39, which is no float32",
    ),
    "dtype an attribute": ({STATE: state(dtype="load")}, 'quant_state has dtype "load", which is none of float32'),
    "shape null": ({STATE: state(shape=None)}, "quant_state has shape null, which is no list of 1 to 8 sizes"),
    "shape empty": ({STATE: state(shape=[])}, "quant_state has shape [], which is no list of 1 to 8 sizes"),
    "shape negative": ({STATE: state(shape=[-9, -17])}, "quant_state has shape [-9, -17], whose sizes make no sense"),
    "shape enormous": ({STATE: state(shape=[2**40, 2**40])}, "whose sizes make no sense"),
    "shape too large": (
        {STATE: state(shape=[9, 18])},
        "shape [9, 18] in its quant_state needs 81 packed bytes, and",
    ),
    "codes too short": ({"w": torch.zeros(76, 1, dtype=torch.uint8)}, "needs 77 packed bytes, and the file holds 76"),
    "absmax missing": ({"w.absmax": None}, "weight 'w' lacks its absmax"),
    "absmax too long": ({"w.absmax": torch.zeros(4, dtype=torch.uint8)}, "absmax is U8 [4] where U8 [3] is needed"),
    "absmax unpacked": ({"w.absmax": torch.zeros(3)}, "weight 'w': absmax is F32 [3] where U8 [3] is needed"),
    "levels missing": ({"w.quant_map": None}, "weight 'w' lacks its quant_map"),
    "levels of another size": ({"w.quant_map": torch.zeros(8)}, "quant_map is F32 [8] where F32 [16] is needed"),
    "nested absmax missing": ({"w.nested_absmax": None}, "weight 'w' lacks its nested_absmax"),
    "nested levels short": ({"w.nested_quant_map": torch.zeros(2)}, "nested_quant_map is F32 [2] where F32 [256] is"),
    "codes missing": ({"w": None}, "weight 'w' has a quant_state but no codes"),
    "state missing": ({STATE: None}, "weight 'w' has 'w.nested_absmax' but no quant_state"),
    "two states": (
        {"w.quant_state.bitsandbytes__fp4": state(quant_type="fp4")},
        "weight 'w' has two quant_states",
    ),
}


@pytest.mark.parametrize("case", STORES)
def test_a_malformed_store_names_the_weight_and_the_field(tmp_path: Path, case: str) -> None:
    changes, sentence = STORES[case]
    write_store_folder(tmp_path / "good", {**store_tensors()})
    assert sorted(Store.open(tmp_path / "good").names) == ["kept", "w"]
    write_store_folder(tmp_path / "bad", {**store_tensors(), **changes})
    fails(Store.open, tmp_path / "bad", sentence)


ADAPTER_FIELDS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
KEY = "base_model.model.layers.0.q.lora_%s.weight"


def adapter_tensors() -> dict[str, torch.Tensor]:
    return {KEY % "A": torch.zeros(2, 5), KEY % "B": torch.zeros(7, 2)}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA adapters are read"),
    "DoRA": ({"use_dora": True}, "use_dora is 'True'; only plain LoRA, without it, is read"),
    "biases": ({"bias": "lora_only"}, "bias is 'lora_only'; only plain LoRA"),
    "bias of B": ({"lora_bias": True}, "lora_bias is 'True'; only plain LoRA"),
    "transposed layers": ({"fan_in_fan_out": True}, "fan_in_fan_out is 'True'; only plain LoRA"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is \"['lm_head']\"; only plain LoRA"),
    "repeated layers": ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication is '[[0, 4], [2, 5]]'; only"),
    "trained tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices is '[1]'; only plain LoRA"),
    "parameters": ({"target_parameters": ["w"]}, "target_parameters is \"['w']\"; only plain LoRA"),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is '[1]'; only plain LoRA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base's"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changes the base's weights as well"),
    "no rank": ({"r": None}, "r is 'None', which is no positive whole number"),
    "rank 0": ({"r": 0}, "r is '0', which is no positive whole number"),
    "rank a list": ({"r": [2]}, "r is '[2]', which is no positive whole number"),
    "alpha text": ({"lora_alpha": "4"}, "lora_alpha is '4', which is no number"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha is 'True', which is no number"),
    "rslora a number": ({"use_rslora": 1}, "use_rslora is '1', which is neither true nor false"),
    "targets a number": ({"target_modules": 7}, "target_modules is neither a list of names nor a pattern"),
    "targets of numbers": ({"target_modules": [7]}, "target_modules is neither a list of names nor a pattern"),
    "base a list": ({"base_model_name_or_path": []}, "base_model_name_or_path is '[]', which is no text"),
    "patterns a list": ({"rank_pattern": ["q"]}, "rank_pattern is no map from module names to numbers"),
    "pattern invalid": ({"rank_pattern": {"q(": 2}}, "rank_pattern has the invalid pattern 'q('"),
    "pattern of rank 0": ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] is '0', which is no positive whole number"),
    "pattern of text": ({"alpha_pattern": {"q": "x"}}, "alpha_pattern['q'] is 'x', which is no number"),
    "pattern that hangs": ({"rank_pattern": {"(.*)*x": 2}}, "rank_pattern has the pattern '(.*)*x', too complex"),
    "pattern of another rank": (
        {"rank_pattern": {"q": 3}},
        "has A [2, 5] and B [7, 2] where adapter_config.json",
    ),
}

WEIGHTS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "none at all": ({KEY % "A": None, KEY % "B": None}, "holds no tensors: the adapter was saved without its weights"),
    "A alone": ({KEY % "B": None}, "module 'layers.0.q' has no lora_B"),
    "B alone": ({KEY % "A": None}, "module 'layers.0.q' has no lora_A"),
    "ranks that differ": ({KEY % "A": torch.zeros(3, 5)}, "module 'layers.0.q' has A [3, 5] and B [7, 2] where"),
    "a vector": ({KEY % "A": torch.zeros(2)}, "is not a matrix of float32, float16 or bfloat16"),
    "integers": ({KEY % "A": torch.zeros(2, 5, dtype=torch.int8)}, "is not a matrix of float32, float16 or bfloat16"),
    "no prefix": ({"layers.0.q.lora_A.weight": torch.zeros(2, 5)}, "it is no base_model.model.MODULE.lora_A.weight"),
    "a whole module": ({"base_model.model.score.weight": torch.zeros(2, 5)}, "(a module saved in full?)"),
    "an embedding": ({"base_model.model.e.lora_embedding_A": torch.zeros(2, 5)}, "it adapts an embedding"),
    "DoRA": ({"base_model.model.q.lora_magnitude_vector.weight": torch.zeros(2)}, "it belongs to DoRA"),
    "a bias": ({"base_model.model.layers.0.q.lora_B.bias": torch.zeros(7)}, "it is a trained bias"),
}


def write_adapter_folder(path: Path, fields: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> None:
    path.mkdir()
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(present, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_config_is_refused_by_field_or_feature(tmp_path: Path, case: str) -> None:
    changes, sentence = CONFIGS[case]
    write_adapter_folder(tmp_path / "good", {**ADAPTER_FIELDS, "some_new_key": 1}, {**adapter_tensors()})
    assert AdapterFolder.open(tmp_path / "good").config.scale("layers.0.q") == 2.0
    write_adapter_folder(tmp_path / "bad", {**ADAPTER_FIELDS, **changes}, {**adapter_tensors()})
    fails(AdapterFolder.open, tmp_path / "bad", sentence)


@pytest.mark.parametrize("case", WEIGHTS)
def test_adapter_weights_are_refused_by_key(tmp_path: Path, case: str) -> None:
    changes, sentence = WEIGHTS[case]
    write_adapter_folder(tmp_path / "bad", ADAPTER_FIELDS, {**adapter_tensors(), **changes})
    fails(AdapterFolder.open, tmp_path / "bad", sentence)


def test_an_adapter_folder_that_lacks_a_file_says_which(tmp_path: Path, sharded: Path) -> None:
    fails(AdapterFolder.open, sharded, "is not an adapter: it has no adapter_config.json; it is a model")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text(json.dumps(ADAPTER_FIELDS))
    fails(AdapterFolder.open, tmp_path / "pickled", "pickled holds no adapter_model.safetensors")
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x02")
    fails(AdapterFolder.open, tmp_path / "pickled", "adapter_model.bin is a pickle, which is not read: load")
