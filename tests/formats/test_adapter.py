"""PEFT's adapters, read and written; PEFT's own view of ours is tested in tests/interop."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_formats.adapter import AdapterFolder, write_adapter
from qlora_formats.adapter_config import AdapterConfig
from qlora_formats.commit import commit_folder
from qlora_formats.errors import FormatError
from qlora_formats.header import read_header

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]

CONFIG = AdapterConfig(
    r=4,
    lora_alpha=16,
    lora_dropout=0.05,
    target_modules=["v_proj", "q_proj"],
    task_type="CAUSAL_LM",
    base_model_name_or_path="org/model-7b",
)


@pytest.fixture
def pairs() -> Pairs:
    torch.manual_seed(0)
    modules = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 10) for name in ("q_proj", "v_proj")]
    return {module: (torch.randn(4, 7), torch.randn(9, 4)) for module in modules}


def write(target: Path, pairs: Pairs, config: AdapterConfig = CONFIG) -> Path:
    with commit_folder(target, kind="adapter", inputs={}) as folder:
        write_adapter(folder, config=config, pairs=pairs, metadata={"base_sha256": "ab" * 32})
        folder.finish()
    return target


def test_what_is_written_comes_back(tmp_path: Path, pairs: Pairs) -> None:
    adapter = AdapterFolder.open(write(tmp_path / "out", pairs))
    assert adapter.config == AdapterConfig(**{**fields(CONFIG), "target_modules": ["q_proj", "v_proj"]})
    assert adapter.metadata == {"base_sha256": "ab" * 32, "format": "pt"}
    assert adapter.pairs.keys() == pairs.keys()
    for module, (a, b) in pairs.items():
        assert torch.equal(adapter.pairs[module][0], a)
        assert torch.equal(adapter.pairs[module][1], b)


def fields(config: AdapterConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__slots__}


def test_the_bytes_depend_neither_on_order_nor_on_the_dtype_of_what_is_exact(tmp_path: Path, pairs: Pairs) -> None:
    rounded = {module: (a.bfloat16(), b.bfloat16()) for module, (a, b) in pairs.items()}
    floats = {module: (a.float(), b.float()) for module, (a, b) in reversed(rounded.items())}
    one, two = write(tmp_path / "one", rounded), write(tmp_path / "two", floats)
    assert {path.name for path in one.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "qlora_pipe.json",
    }
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()
    assert {entry.dtype for entry in read_header(one / "adapter_model.safetensors").entries.values()} == {"F32"}


def test_the_keys_and_the_config_are_those_of_peft(tmp_path: Path, pairs: Pairs, shared_data: Path) -> None:
    ours = write(tmp_path / "out", pairs)
    theirs = shared_data / "interop" / "stories260K-lora-qv-r4-rslora"
    keys = load_file(ours / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert {key for key in keys if ".layers.1." in key} <= load_file(theirs / "adapter_model.safetensors").keys()
    config = json.loads((ours / "adapter_config.json").read_bytes())
    assert config.keys() <= json.loads((theirs / "adapter_config.json").read_bytes()).keys()
    assert (config["peft_type"], config["bias"], config["inference_mode"]) == ("LORA", "none", True)


@pytest.mark.parametrize("base", ["org/model-7b", "stories260K", None, "/home/me/model", "a: b"])
def test_the_model_card_names_the_base_only_if_it_is_a_hub_id(tmp_path: Path, pairs: Pairs, base: str | None) -> None:
    config = AdapterConfig(**{**fields(CONFIG), "base_model_name_or_path": base})
    card = (write(tmp_path / "out", pairs, config) / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: peft\n" in card
    assert ("base_model:" in card) == (base in {"org/model-7b", "stories260K"})
    assert "/home" not in card


@pytest.mark.parametrize(
    ("name", "r", "scale", "n_modules"),
    [
        ("stories260K-lora-all-r8", 8, 2.0, 35),
        ("stories260K-lora-qv-r4-rslora", 4, 8 / math.sqrt(4), 10),
        ("t5-stories-280k-lora-all-r8", 8, None, None),
    ],
)
def test_adapters_that_peft_wrote_are_read(
    shared_data: Path, name: str, r: int, scale: float | None, n_modules: int | None
) -> None:
    path = shared_data / "interop" / name
    adapter = AdapterFolder.open(path)
    raw = load_file(path / "adapter_model.safetensors")
    assert len(adapter.pairs) * 2 == len(raw)
    assert n_modules in {None, len(adapter.pairs)}
    for module, (a, b) in adapter.pairs.items():
        assert (a.shape[0], b.shape[1]) == (r, r)
        assert torch.equal(a, raw[f"base_model.model.{module}.lora_A.weight"])
        assert scale is None or adapter.config.scale(module) == scale


def test_published_adapters_are_read_or_refused_by_the_feature_they_use(tmp_path: Path, shared_data: Path) -> None:
    maps = json.loads((shared_data / "interop" / "real_world" / "peft_adapter_keymaps.json").read_bytes())
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    said: dict[str, int | str] = {}
    for name, published in maps.items():
        folder = tmp_path / name
        folder.mkdir()
        tensors = {key: torch.zeros(shape, dtype=dtypes[dtype]) for key, (shape, dtype) in published["tensors"].items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata=published["safetensors_metadata"])
        config = published["adapter_config"] or {"peft_type": "LORA", "r": 16, "lora_alpha": 32}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        try:
            said[name] = len(AdapterFolder.open(folder).pairs)
        except FormatError as error:
            said[name] = str(error).split(": ")[1].split(" is ")[0]
    assert said == {
        "t5-small-lora-r16-qv": 36,
        "opt-125m-lora-r16-qv": 24,
        "gptneox-lora-r1": 24,
        "gpt2-lora-r8": "fan_in_fan_out",
        "gpt2-lora-r8-seqcls": "fan_in_fan_out",
    }


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("layers.1", "model.layers.1.self_attn.q_proj", False),
        (r"layers\.(0|2)\..*q_proj", "model.layers.2.self_attn.q_proj", True),
        ("^q_proj", "model.q_proj", False),
        ("^q_proj", "q_proj", True),
        ("q_proj|v_proj", "model.v_proj", True),
    ],
)
def test_patterns_match_the_end_of_a_module_path_as_in_peft(pattern: str, path: str, matches: bool) -> None:
    other = {"never": 1, pattern: 2}
    config = AdapterConfig(r=8, lora_alpha=16, rank_pattern=other, alpha_pattern={pattern: 32})
    assert config.rank(path) == (2 if matches else 8)
    assert config.scale(path) == (32 / 2 if matches else 16 / 8)


def test_rank_and_alpha_patterns_of_a_folder_are_honoured(tmp_path: Path, pairs: Pairs) -> None:
    odd = "model.layers.10.self_attn.v_proj"
    pairs[odd] = (torch.randn(3, 7), torch.randn(9, 3))
    config = AdapterConfig(**{**fields(CONFIG), "rank_pattern": {odd: 3}, "alpha_pattern": {"v_proj": 6.0}})
    adapter = AdapterFolder.open(write(tmp_path / "out", pairs, config))
    assert adapter.config.scale(odd) == 2.0
    assert adapter.config.scale("model.layers.1.self_attn.v_proj") == 1.5
    assert adapter.config.scale("model.layers.1.self_attn.q_proj") == 4.0
