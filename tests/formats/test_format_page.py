"""docs/format.md is enough to implement from: a reader that knows nothing else reads what the product reads."""

import ast
import json
import re
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_formats.errors import FormatError
from qlora_formats.manifest import Manifest
from qlora_formats.store import Store, StoredWeight
from qlora_kernels.dispatch import dequantize
from qlora_pipe.cli import execute
from qlora_pipe.nn.linear import quantized_tensor
from qlora_pipe.testing import tiny_checkpoint
from tests.formats import page_reader
from tests.formats.page_reader import PageError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"
LAYERS = 3
BLOCKS = [f"model.layers.{layer}." for layer in range(LAYERS)]

MODELS: dict[str, dict[str, Any]] = {
    "usual widths": {"hidden_size": 64, "intermediate_size": 192, "dtype": torch.bfloat16},
    "odd widths, biases": {
        "hidden_size": 33, "head_dim": 4, "intermediate_size": 71, "attention_bias": True, "dtype": torch.float16,
    },
    "weights of odd length": {"hidden_size": 7, "head_dim": 2, "num_attention_heads": 1, "num_key_value_heads": 1,
                              "intermediate_size": 5, "dtype": torch.float32},
}  # fmt: skip
FLAGS = ["", "--type fp4", "--no-double-quant", "--block-size 32 --shard-mib 1", "--block-size 4096 --type fp4"]


def make_store(folder: Path, model: str, flags: str) -> Path:
    source = tiny_checkpoint(folder / "source", num_hidden_layers=LAYERS, vocab_size=9000, **MODELS[model])
    assert execute(["quantize", str(source), str(folder / "store"), *flags.split()]) == 0
    return folder / "store"


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("model", MODELS)
def test_a_reader_written_from_the_page_gives_the_products_values(tmp_path: Path, model: str, flags: str) -> None:
    folder = make_store(tmp_path, model, flags)
    read, store = page_reader.read_store(folder), Store.open(folder)
    assert read.keys() == set(store.names)
    for name in store.names:
        weight = store.weight(name)
        values, state = read[name]
        assert (state is not None) == isinstance(weight, StoredWeight)
        if isinstance(weight, StoredWeight):
            assert state is not None
            assert (state["quant_type"], state["blocksize"]) == (weight.kind, weight.block_size)
            weight = dequantize(quantized_tensor(weight, name=name), torch.float32)
        assert values.shape == tuple(weight.shape)
        assert torch.equal(torch.from_numpy(values.copy()), weight.float()), name


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("model", MODELS)
def test_order_digests_and_errors_are_as_the_page_says(tmp_path: Path, model: str, flags: str) -> None:
    folder = make_store(tmp_path, model, flags)
    manifest = page_reader.read_manifest(folder)
    assert manifest["kind"] == "store"
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "qlora_pipe.json"}
    files = page_reader.shards(folder)
    if "--shard-mib" in flags and model == "usual widths":
        assert len(files) > 1
    for block in BLOCKS:
        holders = [name for name, tensors in files.items() if any(key.startswith(block) for key in tensors)]
        assert len(holders) == 1, f"{block} is split between shards"
    source = page_reader.tensor_file(tmp_path / "source" / "model.safetensors")
    read = page_reader.read_store(folder)
    for file, tensors in files.items():
        page_reader.check_layout(tensors, blocks=BLOCKS)
        record = manifest["files"][file]["facts"]
        assert record["header"] == page_reader.digest_of_header(folder / file)
        facts = record["tensors"]
        assert facts.keys() == read.keys() & tensors.keys()
        for name, known in facts.items():
            assert known["sha256"] == page_reader.digest_of_weight(name, tensors)
            assert ("relative_error" in known) == (read[name].state is not None)
            if "relative_error" in known:
                exact = page_reader.as_float32(source[name]).astype(np.float64)
                error = np.linalg.norm(exact - read[name].values) / np.linalg.norm(exact)
                assert known["relative_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", ["stories260K-bnb-nf4-dq", "stories260K-bnb-nf4-dq-bf16", "stories260K-bnb-fp4"])
def test_published_checkpoints_are_read_from_the_page_alone(shared_data: Path, name: str) -> None:
    folder = shared_data / "interop" / name
    read = page_reader.read_store(folder)
    reference = page_reader.tensor_file(folder / "reference_dequant.safetensors")
    weights = [key for key in reference if key.endswith(".weight")]
    assert len(weights) == 4
    for key in weights:
        values = torch.from_numpy(read[key].values.copy())
        if name.endswith("bf16"):
            # The publisher dequantised to the source's type.
            values = values.bfloat16().float()
        assert torch.equal(values, torch.from_numpy(reference[key].array().copy()))


def test_both_readers_refuse_the_same_damage(tmp_path: Path) -> None:
    folder = make_store(tmp_path, "odd widths, biases", "")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header_bytes = int.from_bytes(whole[:8], "little")
    damages = {
        "cut off": whole[:-1],
        "longer": whole + b" ",
        "header longer": (header_bytes + 1).to_bytes(8, "little") + whole[8:],
        "a size changed": whole.replace(b'"shape":[33]', b'"shape":[34]', 1),
        "an offset changed": whole.replace(b'"data_offsets":[0,', b'"data_offsets":[1,', 1),
        "a name twice": whole.replace(b"model.layers.1.mlp.up_proj.", b"model.layers.2.mlp.up_proj."),
        "a type changed": whole.replace(b'{"quant_type": "nf4"', b'{"quant_type": "fp4"', 1),
        "a block size changed": whole.replace(b'"blocksize": 64', b'"blocksize": 63', 1),
        "a shape changed": whole.replace(b'"shape": [71, 33]', b'"shape": [71, 35]', 1),
        "not a number": whole.replace(b'"nested_offset": 0', b'"nested_offset":NaN', 1),
    }
    (folder / "qlora_pipe.json").unlink()
    for case, data in damages.items():
        assert data != whole, case
        file.write_bytes(data)
        with pytest.raises(FormatError):
            Store.open(folder)
        with pytest.raises((PageError, KeyError)):
            page_reader.read_store(folder)


def test_both_readers_notice_a_flipped_bit(tmp_path: Path) -> None:
    folder = make_store(tmp_path, "odd widths, biases", "")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(FormatError, match="does not have the sha256"):
        Manifest.read(folder).verify(folder)
    with pytest.raises(PageError, match="was changed"):
        page_reader.read_manifest(folder)


def test_the_reader_knows_nothing_but_the_page() -> None:
    tree = ast.parse(Path(page_reader.__file__).read_text())
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)])
    }
    assert imported - sys.stdlib_module_names == {"numpy"}


def test_the_pages_own_examples_hold() -> None:
    page = PAGE.read_text()
    # Its levels are the product's, and those of the reader that was written from it.
    text = re.search(r"as float32:\n`(-1, [^`]+)`", page)
    assert text is not None
    assert " ".join(text[1].split()) == page_reader.NF4
    for kind in ("nf4", "fp4"):
        assert page_reader.LEVELS[kind].tolist() == levels_of(kind)
    example = re.search(r"```json\n(\{.*?\n\})\n```", page, re.DOTALL)
    assert example is not None
    manifest = json.loads(example[1])
    assert manifest.keys() == {"digest", "files", "format", "inputs", "kind", "version"}
    header = re.search(r'`(\{"NAME": .*?\})`', page, re.DOTALL)
    assert header is not None
    entry = json.loads(header[1].replace("...,", ""))["NAME"]
    assert entry["data_offsets"][1] == 2 * prod(entry["shape"])


def levels_of(kind: Any) -> list[float]:
    from qlora_kernels.levels import levels_of as levels

    return [float(value) for value in levels(kind)]
