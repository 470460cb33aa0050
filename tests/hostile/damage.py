"""What the tables of hostile folders share: small folders to damage, ways to damage them, and what a refusal is."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora_formats.errors import FormatError
from qlora_formats.strict_json import canonical
from qlora_pipe.cli import execute

Damage = Callable[[Path], object]
Tensors = Mapping[str, torch.Tensor | None]

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
STATE = "w.quant_state.bitsandbytes__nf4"
LORA = "base_model.model.layers.0.q.lora_%s.weight"

STATE_FIELDS: dict[str, Any] = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "bfloat16",
    "shape": [9, 17],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 0.25,
}
ADAPTER_FIELDS: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q"],
    "bias": "none",
}


def fails(open_folder: Callable[[Path], object], path: Path, sentence: str) -> None:
    """Opening `path` must be refused in one line that holds `sentence` and names the path."""
    with pytest.raises(FormatError, match=re.escape(sentence)) as caught:
        open_folder(path)
    said = str(caught.value)
    assert str(path) in said
    assert "\n" not in said
    assert len(said) < 600 + 2 * len(str(path))


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """The exit code and the one sentence of a command that must fail, after the notes it may have given."""
    capsys.readouterr()
    code = execute([str(word) for word in words])
    said = capsys.readouterr()
    assert said.out == ""
    *notes, sentence = said.err.splitlines()
    assert all(note.startswith("note: ") for note in notes), said.err
    assert sentence.startswith("error: ")
    assert "Traceback" not in said.err
    assert len(sentence) < 1000
    return code, sentence.removeprefix("error: ")


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


def settings(**fields: Any) -> Damage:
    return edit("config.json", lambda config: config.update(fields))


def resign(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Edit a manifest and give it the right digest, as a program with a fault, or a stranger, would."""

    def signed(value: dict[str, Any]) -> None:
        change(value)
        body = {key: part for key, part in value.items() if key != "digest"}
        value["digest"] = hashlib.sha256(canonical(body)).hexdigest()

    return edit("qlora_pipe.json", signed)


def replace(name: str, make: Damage) -> Damage:
    """Put something else in the place of a file."""

    def damage(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return damage


def link(target: str | Path) -> Damage:
    return lambda path: path.symlink_to(target)


def link_out(path: Path) -> None:
    """Move a file out of its folder and leave a link to it."""
    outside = path.parent.parent / f"outside {path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def together(*damages: Damage) -> Damage:
    def damage(path: Path) -> None:
        for one in damages:
            one(path)

    return damage


def write_sharded_model(path: Path) -> Path:
    """A model of two tensors in two shards."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for number, name in enumerate(SHARDS, start=1):
        save_file({f"layers.{number}.weight": torch.ones(number)}, path / name)
        weight_map[f"layers.{number}.weight"] = name
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}))
    return path


def state(data: bytes | None = None, **changes: Any) -> torch.Tensor:
    """A quant_state: the good one with some fields changed ("absent" removes one), or any bytes."""
    fields = {key: value for key, value in {**STATE_FIELDS, **changes}.items() if value != "absent"}
    return torch.tensor(list(json.dumps(fields).encode() if data is None else data), dtype=torch.uint8)


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


def packed_as(name: str, shape: list[int], *, levels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a weight in 4 bits, of zeros, without double quantization."""
    n_weights = math.prod(shape)
    fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": shape}
    return {
        name: torch.full((math.ceil(n_weights / 2), 1), 0x77, dtype=torch.uint8),
        f"{name}.absmax": torch.ones(math.ceil(n_weights / 64)),
        f"{name}.quant_map": levels.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": state(json.dumps(fields).encode()),
    }


def write_store_folder(path: Path, tensors: Tensors) -> Path:
    path.mkdir()
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def adapter_tensors() -> dict[str, torch.Tensor]:
    return {LORA % "A": torch.zeros(2, 5), LORA % "B": torch.zeros(7, 2)}


def write_adapter_folder(path: Path, fields: Mapping[str, Any], tensors: Tensors) -> Path:
    path.mkdir()
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(present, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path
