"""Malformed 4-bit weights: each gives one sentence that names the weight and the field or tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.store import Store, StoredWeight, is_store
from tests.hostile.damage import STATE, Tensors, fails, packed_as, state, store_tensors, write_store_folder

STORES: dict[str, tuple[Tensors, str]] = {
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
    "JSON empty": ({STATE: state(b"")}, "weight 'w': quant_state is not valid JSON"),
    "JSON followed by NULs": ({STATE: state(b"{}\0\0")}, "weight 'w': quant_state is not valid JSON: Extra data"),
    "JSON deep": (
        {STATE: state(b'{"a":' * 5000)},
        "weight 'w': quant_state is not valid JSON: it is nested too deeply",
    ),
    "JSON key twice": (
        {STATE: state(b'{"quant_type": "nf4", "quant_type": "fp4"}')},
        "weight 'w': quant_state is not valid JSON: the key 'quant_type' stands twice",
    ),
    "JSON half a pair": (
        {STATE: state(b'{"quant_type": "\\ud800"}')},
        "quant_state is not valid JSON: it holds half of",
    ),
    "JSON a matrix": ({STATE: state()[None]}, "weight 'w': quant_state is no list of at most 65,536 bytes (U8)"),
    "JSON of I8": (
        {STATE: state().view(torch.int8)},
        "weight 'w': quant_state is no list of at most 65,536 bytes (U8)",
    ),
    "no nested dtype": ({STATE: state(nested_dtype="absent")}, "quant_state lacks nested_dtype"),
    "type null": ({STATE: state(quant_type=None)}, "quant_state has quant_type null, named 'nf4'"),
    "type a list": ({STATE: state(quant_type=["nf4"])}, """quant_state has quant_type ["nf4"], named 'nf4'"""),
    "block size 1": ({STATE: state(blocksize=1)}, "quant_state has blocksize 1, which is no power of two"),
    "block size 3": ({STATE: state(blocksize=3)}, "quant_state has blocksize 3, which is no power of two"),
    "block size -64": ({STATE: state(blocksize=-64)}, "quant_state has blocksize -64, which is no power of two"),
    "block size 1e9": (
        {STATE: state(blocksize=1e9)},
        "quant_state has blocksize 1000000000.0, which is no power of two",
    ),
    "block size 10**9": ({STATE: state(blocksize=10**9)}, "quant_state has blocksize 1000000000, which is no power of"),
    "block size 2**17": ({STATE: state(blocksize=2**17)}, "quant_state has blocksize 131072, which is no power of two"),
    "block size text": ({STATE: state(blocksize="64")}, 'quant_state has blocksize "64", which is no power of two'),
    "block size 64.0": ({STATE: state(blocksize=64.0)}, "quant_state has blocksize 64.0, which is no power of two"),
    "block size null": ({STATE: state(blocksize=None)}, "quant_state has blocksize null, which is no power of two"),
    "block size another": ({STATE: state(blocksize=32)}, "weight 'w': absmax is U8 [3] where U8 [5] is needed"),
    "nested block size 0": (
        {STATE: state(nested_blocksize=0)},
        "quant_state has nested_blocksize 0, which is no power",
    ),
    "nested block size 2": ({STATE: state(nested_blocksize=2)}, "nested_absmax is F32 [1] where F32 [2] is needed"),
    "nested dtype null": ({STATE: state(nested_dtype=None)}, "quant_state has nested_dtype null; only float32 is read"),
    "offset NaN": (
        {STATE: state(nested_offset=float("nan"))},
        "quant_state is not valid JSON: NaN is not a JSON number",
    ),
    "offset infinite": ({STATE: state(nested_offset=float("inf"))}, "Infinity is not a JSON number"),
    "offset null": ({STATE: state(nested_offset=None)}, "quant_state has nested_offset null, which is no float32"),
    "offset true": ({STATE: state(nested_offset=True)}, "quant_state has nested_offset true, which is no float32"),
    "offset of 300 digits": (
        {STATE: state(nested_offset=10**299)},
        f"quant_state has nested_offset 1{'0' * 59}, which is no float32",
    ),
    "offset of 400 digits": ({STATE: state(nested_offset=10**399)}, "quant_state is not valid JSON: 1000"),
    "dtype null": (
        {STATE: state(dtype=None)},
        "quant_state has dtype null, which is none of float32, float16, bfloat16",
    ),
    "dtype a list": ({STATE: state(dtype=["float32"])}, 'quant_state has dtype ["float32"], which is none of float32'),
    "dtype float64": ({STATE: state(dtype="float64")}, 'quant_state has dtype "float64", which is none of float32'),
    "shape a number": ({STATE: state(shape=153)}, "quant_state has shape 153, which is no list of 1 to 8 sizes"),
    "shape text": ({STATE: state(shape="9,17")}, 'quant_state has shape "9,17", which is no list of 1 to 8 sizes'),
    "shape of rank 9": (
        {STATE: state(shape=[1] * 9)},
        "quant_state has shape [1, 1, 1, 1, 1, 1, 1, 1, 1], which is no",
    ),
    "shape of halves": ({STATE: state(shape=[9.0, 17])}, "quant_state has shape [9.0, 17], whose sizes make no sense"),
    "shape of true": (
        {STATE: state(shape=[True, 153])},
        "quant_state has shape [true, 153], whose sizes make no sense",
    ),
    "shape of text": ({STATE: state(shape=["9", 17])}, 'quant_state has shape ["9", 17], whose sizes make no sense'),
    "shape of lists": ({STATE: state(shape=[[9], 17])}, "quant_state has shape [[9], 17], whose sizes make no sense"),
    "shape of none": ({STATE: state(shape=[0, 17])}, "quant_state has shape [0, 17], whose sizes make no sense"),
    "shape that wraps to 153": (
        {STATE: state(shape=[2**62, 4, 153])},
        "quant_state has shape [4611686018427387904, 4, 153], whose sizes make no sense",
    ),
    "shape too small": ({STATE: state(shape=[9, 16])}, "shape [9, 16] in its quant_state needs 72 packed bytes, and"),
    "codes of none": ({"w": torch.zeros(0, 1, dtype=torch.uint8)}, "needs 77 packed bytes, and the file holds 0"),
    "codes unpacked": ({"w": torch.zeros(9, 17)}, "needs 77 packed bytes, and the file holds 612"),
    "absmax of none": ({"w.absmax": torch.zeros(0, dtype=torch.uint8)}, "absmax is U8 [0] where U8 [3] is needed"),
    "absmax a matrix": (
        {"w.absmax": torch.zeros(3, 1, dtype=torch.uint8)},
        "absmax is U8 [3, 1] where U8 [3] is needed",
    ),
    "absmax packed, and single": (
        {
            STATE: state(nested_blocksize="absent", nested_dtype="absent", nested_offset="absent"),
            "w.nested_absmax": None,
            "w.nested_quant_map": None,
        },
        "weight 'w': absmax is U8 [3] where F32 [3] is needed",
    ),
    "levels in half": ({"w.quant_map": torch.zeros(16).half()}, "quant_map is F16 [16] where F32 [16] is needed"),
    "nested absmax too long": ({"w.nested_absmax": torch.zeros(2)}, "nested_absmax is F32 [2] where F32 [1] is needed"),
    "nested absmax doubled": (
        {"w.nested_absmax": torch.zeros(1, dtype=torch.float64)},
        "nested_absmax is F64 [1] where F32 [1] is needed",
    ),
    "nested levels missing": ({"w.nested_quant_map": None}, "weight 'w' lacks its nested_quant_map"),
    "scales alone": ({STATE: None, "w.nested_absmax": None, "w.nested_quant_map": None}, "weight 'w' has 'w."),
    "a weight of no name": ({".quant_state.bitsandbytes__nf4": state()}, "weight '' has a quant_state but no codes"),
    "scales in 4 bits themselves": (
        packed_as("w.absmax", [6], levels=torch.zeros(16)) | {"w.absmax": torch.zeros(3, dtype=torch.uint8)},
        "weight 'w.absmax' has a quant_state, although it is itself a part of another weight",
    ),
    "a JSON in 4 bits itself": (
        packed_as(STATE, [2 * len(state())], levels=torch.zeros(16)) | {STATE: state()},
        f"weight {STATE!r} has a quant_state, although it is itself a part of another weight",
    ),
    "no weight in 4 bits": (
        dict.fromkeys(("w", "w.absmax", "w.quant_map", "w.nested_absmax", "w.nested_quant_map", STATE)),
        "holds no weight in 4 bits, although its config.json says that it does",
    ),
}


@pytest.mark.parametrize("case", STORES)
def test_a_malformed_store_names_the_weight_and_the_field(tmp_path: Path, case: str) -> None:
    changes, sentence = STORES[case]
    good = write_store_folder(tmp_path / "good", store_tensors())
    assert sorted(Store.open(good).names) == ["kept", "w"]
    fails(Store.open, write_store_folder(tmp_path / "bad", {**store_tensors(), **changes}), sentence)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": 4},
        {"quantization_config": ["bitsandbytes"]},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": "true"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": 1}},
        {"quantization_config": {"quant_method": ["bitsandbytes"], "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq", "load_in_4bit": True}},
    ],
    ids=str,
)
def test_a_config_that_does_not_say_4_bits_of_bitsandbytes_makes_no_store(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    folder = write_store_folder(tmp_path / "x", store_tensors())
    (folder / "config.json").write_text(json.dumps(fields))
    assert not is_store(folder)
    fails(Store.open, folder, "is not a 4-bit checkpoint: config.json has no quantization_config of bitsandbytes")


@pytest.mark.parametrize("broken", ["{", '{"quantization_config": NaN}', "[]"])
def test_a_broken_config_is_no_answer_to_whether_a_folder_is_a_store(tmp_path: Path, broken: str) -> None:
    folder = write_store_folder(tmp_path / "x", store_tensors())
    (folder / "config.json").write_text(broken)
    fails(is_store, folder, "config.json")


def test_parts_of_a_weight_may_lie_in_several_shards(tmp_path: Path) -> None:
    tensors = store_tensors()
    folder = write_store_folder(tmp_path / "x", tensors)
    names = {name: f"model-{number:05}-of-{len(tensors):05}.safetensors" for number, name in enumerate(tensors, 1)}
    for name, file in names.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    weight = Store.open(folder).weight("w")
    assert isinstance(weight, StoredWeight)
    assert (weight.shape, weight.codes.shape, weight.absmax.shape) == ((9, 17), (77,), (3,))


@pytest.mark.parametrize(
    "names",
    [("weight", "WEIGHT", "Weight"), ("caf\u00e9", "cafe\u0301"), ("\u2126", "\u03a9"), ("ﬁ", "fi"), (" w", "w", "w ")],
    ids=ascii,
)
def test_names_are_compared_as_they_are(tmp_path: Path, names: tuple[str, ...]) -> None:
    # Folding case or normalising text would make one name of two tensors.
    folder = write_store_folder(tmp_path / "x", {name: torch.full((2,), float(n)) for n, name in enumerate(names)})
    opened = CheckpointFolder.open(folder)
    assert sorted(opened.names) == sorted(names)
    assert [opened.tensor(name)[0] for name in names] == [*range(len(names))]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_codes_may_be_stored_as_any_type_whose_bytes_are_as_many(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.arange(80, dtype=torch.uint8)
    changes = {
        "w": codes.view(dtype),
        "w.absmax": torch.zeros(3, dtype=torch.uint8),
        STATE: state(shape=[10, 16]),
    }
    weight = Store.open(write_store_folder(tmp_path / "x", {**store_tensors(), **changes})).weight("w")
    assert isinstance(weight, StoredWeight)
    assert torch.equal(weight.codes, codes)
