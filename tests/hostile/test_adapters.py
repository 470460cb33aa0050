"""Malformed adapter folders: each gives one sentence that names the field, the feature or the key."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_formats.adapter import AdapterFolder
from tests.hostile.damage import (
    ADAPTER_FIELDS,
    LORA,
    Damage,
    Tensors,
    adapter_tensors,
    fails,
    link,
    link_out,
    remove,
    replace,
    write,
    write_adapter_folder,
    write_sharded_model,
)

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
    "no rank": ({"r": None}, "r is 'None', which is no whole number from 1 to 65,536"),
    "rank 0": ({"r": 0}, "r is '0', which is no whole number from 1 to 65,536"),
    "rank a list": ({"r": [2]}, "r is '[2]', which is no whole number from 1 to 65,536"),
    "alpha text": ({"lora_alpha": "4"}, "lora_alpha is '4', which is no number"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha is 'True', which is no number"),
    "rslora a number": ({"use_rslora": 1}, "use_rslora is '1', which is neither true nor false"),
    "targets a number": ({"target_modules": 7}, "target_modules is neither a list of names nor a pattern"),
    "targets of numbers": ({"target_modules": [7]}, "target_modules is neither a list of names nor a pattern"),
    "base a list": ({"base_model_name_or_path": []}, "base_model_name_or_path is '[]', which is no text"),
    "patterns a list": ({"rank_pattern": ["q"]}, "rank_pattern is no map from module names to numbers"),
    "pattern invalid": ({"rank_pattern": {"q(": 2}}, "rank_pattern has the invalid pattern 'q('"),
    "pattern of rank 0": (
        {"rank_pattern": {"q": 0}},
        "rank_pattern['q'] is '0', which is no whole number from 1 to 65,536",
    ),
    "pattern of text": ({"alpha_pattern": {"q": "x"}}, "alpha_pattern['q'] is 'x', which is no number"),
    "pattern that hangs": ({"rank_pattern": {"(.*)*x": 2}}, "rank_pattern has the pattern '(.*)*x', too complex"),
    "pattern of another rank": (
        {"rank_pattern": {"q": 3}},
        "has A [2, 5] and B [7, 2] where adapter_config.json",
    ),
    "rank true": ({"r": True}, "r is 'True', which is no whole number from 1 to 65,536"),
    "rank a float": ({"r": 2.0}, "r is '2.0', which is no whole number from 1 to 65,536"),
    "rank -2": ({"r": -2}, "r is '-2', which is no whole number from 1 to 65,536"),
    "rank 10**9": ({"r": 10**9}, "r is '1000000000', which is no whole number from 1 to 65,536"),
    "rank of 400 digits": ({"r": 10**399}, "adapter_config.json is not valid JSON: 1000"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha is 'None', which is no number"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "adapter_config.json is not valid JSON: NaN is not a JSON number"),
    "alpha of 400 digits": ({"lora_alpha": 10**399}, "adapter_config.json is not valid JSON: 1000"),
    "dropout 2": ({"lora_dropout": 2}, "lora_dropout is '2', which does not lie between 0 and 1"),
    "dropout -0.1": ({"lora_dropout": -0.1}, "lora_dropout is '-0.1', which does not lie between 0 and 1"),
    "dropout text": ({"lora_dropout": "0"}, "lora_dropout is '0', which is no number"),
    "task a list": ({"task_type": ["CAUSAL_LM"]}, "task_type is \"['CAUSAL_LM']\", which is no text"),
    "revision a number": ({"revision": 1}, "revision is '1', which is no text"),
    "targets an object": ({"target_modules": {"q": 1}}, "target_modules is neither a list of names nor a pattern"),
    "method null": ({"peft_type": None}, "peft_type is 'None'; only LORA adapters are read"),
    "method a list": ({"peft_type": ["LORA"]}, "peft_type is \"['LORA']\"; only LORA adapters are read"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora is 'True'; only plain LoRA"),
    "BD-LoRA": ({"use_bdlora": True}, "use_bdlora is 'True'; only plain LoRA"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config is"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base's weights as well"),
    "CorDA": ({"init_lora_weights": "CorDA"}, "init_lora_weights is 'corda', which changes the base's weights as well"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga', which changes the base's weights"),
    "pattern whose choices multiply": (
        {"rank_pattern": {"(a|aa)" * 20: 2}},
        f"rank_pattern has the pattern '{('(a|aa)' * 20)[:60]}', too complex to be matched safely",
    ),
    "pattern of nested choices": ({"rank_pattern": {"((a|b)|c)x": 2}}, "the pattern '((a|b)|c)x', too complex"),
    "pattern of three repetitions": ({"rank_pattern": {".*a.*b.*": 2}}, "the pattern '.*a.*b.*', too complex"),
    "pattern of a repeated group": ({"rank_pattern": {"(ab){9}x": 2}}, "the pattern '(ab){9}x', too complex"),
    "pattern that looks ahead": ({"rank_pattern": {"(?=a)q": 2}}, "the pattern '(?=a)q', too complex"),
    "pattern that looks back": ({"rank_pattern": {r"(a)\1": 2}}, r"the pattern '(a)\\1', too complex"),
    "pattern of 257 characters": ({"rank_pattern": {"q" * 257: 2}}, f"the pattern '{'q' * 60}', too complex"),
    "pattern that repeats too often": (
        {"rank_pattern": {"q{99999999999}": 2}},
        "rank_pattern has the invalid pattern 'q{99999999999}': the repetition number is too large",
    ),
    "too many patterns": (
        {"rank_pattern": {f"q{n}": 2 for n in range(4097)}},
        "rank_pattern has 4,097 patterns; at most 4,096 are read",
    ),
    "pattern of rank true": ({"rank_pattern": {"q": True}}, "rank_pattern['q'] is 'True', which is no whole number"),
    "pattern of alpha true": ({"alpha_pattern": {"q": True}}, "alpha_pattern['q'] is 'True', which is no number"),
    "patterns text": ({"alpha_pattern": "q"}, "alpha_pattern is no map from module names to numbers"),
}

WEIGHTS: dict[str, tuple[Tensors, str]] = {
    "none at all": (
        {LORA % "A": None, LORA % "B": None},
        "holds no tensors: the adapter was saved without its weights",
    ),
    "A alone": ({LORA % "B": None}, "module 'layers.0.q' has no lora_B"),
    "B alone": ({LORA % "A": None}, "module 'layers.0.q' has no lora_A"),
    "ranks that differ": ({LORA % "A": torch.zeros(3, 5)}, "module 'layers.0.q' has A [3, 5] and B [7, 2] where"),
    "a vector": ({LORA % "A": torch.zeros(2)}, "is not a matrix of float32, float16 or bfloat16"),
    "integers": ({LORA % "A": torch.zeros(2, 5, dtype=torch.int8)}, "is not a matrix of float32, float16 or bfloat16"),
    "no prefix": ({"layers.0.q.lora_A.weight": torch.zeros(2, 5)}, "it is no base_model.model.MODULE.lora_A.weight"),
    "a whole module": ({"base_model.model.score.weight": torch.zeros(2, 5)}, "(a module saved in full?)"),
    "an embedding": ({"base_model.model.e.lora_embedding_A": torch.zeros(2, 5)}, "it adapts an embedding"),
    "DoRA": ({"base_model.model.q.lora_magnitude_vector.weight": torch.zeros(2)}, "it belongs to DoRA"),
    "a bias": ({"base_model.model.layers.0.q.lora_B.bias": torch.zeros(7)}, "it is a trained bias"),
    "another kind of pair": (
        {"base_model.model.layers.0.q.lora_C.weight": torch.zeros(2, 5)},
        "it is no base_model.model",
    ),
    "a pair of no module": ({"base_model.model..lora_A.weight": torch.zeros(2, 5)}, "it is no base_model.model.MODULE"),
    "a rank of none": (
        {LORA % "A": torch.zeros(0, 5), LORA % "B": torch.zeros(7, 0)},
        "has A [0, 5] and B [7, 0] where",
    ),
    "three dimensions": ({LORA % "B": torch.zeros(7, 2, 1)}, "is not a matrix of float32, float16 or bfloat16"),
    "float64": ({LORA % "B": torch.zeros(7, 2).double()}, "is not a matrix of float32, float16 or bfloat16"),
}


FILES: dict[str, tuple[Damage, str]] = {
    "no config": (remove("adapter_config.json"), "is not an adapter: it has no adapter_config.json"),
    "config broken": (write("adapter_config.json", "{"), "adapter_config.json is not valid JSON"),
    "config a list": (write("adapter_config.json", "[]"), "adapter_config.json holds a JSON list where an object is"),
    "config deep": (
        write("adapter_config.json", '{"a":' * 9999),
        "adapter_config.json is not valid JSON: it is nested",
    ),
    "config key twice": (write("adapter_config.json", '{"r": 1, "r": 2}'), "the key 'r' stands twice"),
    "config a folder": (replace("adapter_config.json", Path.mkdir), "adapter_config.json is a folder where a file is"),
    "config a pipe": (replace("adapter_config.json", os.mkfifo), "adapter_config.json is a pipe or a device where a"),
    "config a link out": (
        lambda path: link_out(path / "adapter_config.json"),
        "is a link that leads out of its folder",
    ),
    "no weights": (remove("adapter_model.safetensors"), "holds no adapter_model.safetensors"),
    "weights empty": (write("adapter_model.safetensors", ""), "is not a safetensors file: it has 0 bytes"),
    "weights a folder": (
        replace("adapter_model.safetensors", Path.mkdir),
        "adapter_model.safetensors is a folder where",
    ),
    "weights a pipe": (replace("adapter_model.safetensors", os.mkfifo), "adapter_model.safetensors is a pipe or a"),
    "weights a link to nothing": (
        replace("adapter_model.safetensors", link("gone")),
        "adapter_model.safetensors is a link to nothing where a file is needed",
    ),
    "weights a link out": (
        lambda path: link_out(path / "adapter_model.safetensors"),
        "adapter_model.safetensors is a link that leads out of its folder",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_config_is_refused_by_field_or_feature(tmp_path: Path, case: str) -> None:
    changes, sentence = CONFIGS[case]
    good = write_adapter_folder(tmp_path / "good", {**ADAPTER_FIELDS, "some_new_key": 1}, adapter_tensors())
    assert AdapterFolder.open(good).config.scale("layers.0.q") == 2.0
    bad = write_adapter_folder(tmp_path / "bad", {**ADAPTER_FIELDS, **changes}, adapter_tensors())
    fails(AdapterFolder.open, bad, sentence)


@pytest.mark.parametrize("case", WEIGHTS)
def test_adapter_weights_are_refused_by_key(tmp_path: Path, case: str) -> None:
    changes, sentence = WEIGHTS[case]
    bad = write_adapter_folder(tmp_path / "bad", ADAPTER_FIELDS, {**adapter_tensors(), **changes})
    fails(AdapterFolder.open, bad, sentence)


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_an_adapter_that_is_none_is_named(tmp_path: Path, case: str) -> None:
    damage, sentence = FILES[case]
    path = write_adapter_folder(tmp_path / "adapter", ADAPTER_FIELDS, adapter_tensors())
    damage(path)
    fails(AdapterFolder.open, path, sentence)


def test_an_adapter_folder_that_lacks_a_file_says_which(tmp_path: Path) -> None:
    model = write_sharded_model(tmp_path / "model")
    fails(AdapterFolder.open, model, "is not an adapter: it has no adapter_config.json; it is a model")
    path = write_adapter_folder(tmp_path / "pickled", ADAPTER_FIELDS, adapter_tensors())
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(b"\x80\x02")
    fails(AdapterFolder.open, path, "adapter_model.bin is a pickle, which is not read: load")


@pytest.mark.parametrize("pattern", [".*.*x", "[^x]+[^x]*x", "a.?.{1,400}x"])
def test_patterns_that_are_slow_on_many_long_paths_are_refused_before_they_are_tried(
    tmp_path: Path, pattern: str
) -> None:
    tensors = {}
    for n in range(2000):
        path = f"{'a.' * 210}{n:04}"
        tensors |= {f"base_model.model.{path}.lora_A.weight": torch.zeros(2, 1)}
        tensors |= {f"base_model.model.{path}.lora_B.weight": torch.zeros(1, 2)}
    folder = write_adapter_folder(tmp_path / "x", {**ADAPTER_FIELDS, "rank_pattern": {pattern: 2}}, tensors)
    fails(AdapterFolder.open, folder, "are too complex to be matched with 2,000 modules")


def test_a_pattern_for_every_module_of_a_large_model_is_matched(tmp_path: Path) -> None:
    tensors, patterns = {}, {}
    for layer in range(126):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            path = f"model.layers.{layer}.self_attn.{name}"
            tensors |= {f"base_model.model.{path}.lora_A.weight": torch.zeros(2 + layer % 3, 5)}
            tensors |= {f"base_model.model.{path}.lora_B.weight": torch.zeros(7, 2 + layer % 3)}
            patterns[path.replace(".", r"\.")] = 2 + layer % 3
    folder = write_adapter_folder(tmp_path / "x", {**ADAPTER_FIELDS, "rank_pattern": patterns}, tensors)
    assert len(AdapterFolder.open(folder).modules) == 504


@pytest.mark.parametrize("pattern", [r".*\.layers\.(0|1|2|30)\..*q", "q|k|v", "(?:q|k)", "layers.0.q", "[qk]"])
def test_patterns_as_people_write_them_are_matched(tmp_path: Path, pattern: str) -> None:
    fields: dict[str, Any] = {**ADAPTER_FIELDS, "r": 9, "rank_pattern": {pattern: 2}}
    path = {LORA % side: tensor for side, tensor in zip("AB", adapter_tensors().values(), strict=True)}
    renamed = {name.replace("layers.0.q", "model.layers.0.q"): tensor for name, tensor in path.items()}
    folder = write_adapter_folder(tmp_path / "x", fields, renamed)
    assert AdapterFolder.open(folder).config.rank("model.layers.0.q") == 2
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 9
