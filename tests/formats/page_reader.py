"""A reader of 4-bit stores written from docs/format.md alone: plain Python and numpy, nothing of this project.

It is short and slow, and holds no opinion of its own: where it and the product differ, one of them does not do what the
page says. A test keeps its imports to the standard library and numpy.
"""

import hashlib
import json
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DTYPES = {
    **{"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4"},
    **{"F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8"},
    # numpy lacks these: they are read as the bytes they are.
    **{"BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"},
}
NF4 = (
    "-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, "
    "-0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, "
    "0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1"
)
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)
LEVELS = {
    "nf4": np.array(NF4.split(", "), dtype=np.float32),
    "fp4": np.array([sign * value / 12 + 0.0 for sign in (1, -1) for value in FP4], dtype=np.float32),
}
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE = ".quant_state.bitsandbytes__"


class PageError(Exception):
    """What the page says must be refused."""


class Tensor(NamedTuple):
    """One tensor of a file: its bytes, and where in the file they start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    data: bytes

    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, dtype=DTYPES[self.dtype]).reshape(self.shape)


class Weight(NamedTuple):
    """One weight of a store: float32 values, and of one in 4 bits what its JSON says."""

    values: np.ndarray
    state: dict[str, Any] | None


def require(condition: bool, what: str) -> None:
    if not condition:
        raise PageError(what)


def parsed(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len({key for key, _ in pairs}) == len(pairs), "a key stands twice")
        return dict(pairs)

    def refuse(word: str) -> None:
        raise PageError(f"{word} is no number")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise PageError(str(error)) from error
    require(isinstance(value, dict), "no object")
    return value


def tensor_file(path: Path) -> dict[str, Tensor]:
    data = path.read_bytes()
    require(len(data) >= 16, "too short")
    (length,) = struct.unpack("<Q", data[:8])
    require(8 <= length <= min(16 * 2**20, len(data) - 8), "length of the header")
    header = data[8 : 8 + length]
    require(header.startswith(b"{"), "no header")
    entries = parsed(header)
    metadata = entries.pop("__metadata__", {})
    require(all(isinstance(value, str) for value in metadata.values()), "metadata")
    require(len(entries) <= 65_536, "too many tensors")
    found, reached = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        require(entry.keys() == {"dtype", "shape", "data_offsets"}, "an entry has other fields")
        begin, end = entry["data_offsets"]
        require(begin == reached, f"{name}: a hole or an overlap")
        size = np.dtype(DTYPES[entry["dtype"]]).itemsize
        require(end - begin == prod(entry["shape"]) * size, f"{name}: offsets and shape differ")
        start = 8 + length + begin
        found[name] = Tensor(entry["dtype"], tuple(entry["shape"]), start, data[start : 8 + length + end])
        reached = end
    require(8 + length + reached == len(data), "the file ends elsewhere")
    return found


def shards(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each weight file, by the file's name."""
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": tensor_file(folder / "model.safetensors")}
    weight_map = parsed((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    files = {name: tensor_file(folder / name) for name in sorted(set(weight_map.values()))}
    placed = {tensor: name for name, tensors in files.items() for tensor in tensors}
    require(placed == weight_map, "index and shards differ")
    require(sum(map(len, files.values())) == len(weight_map), "a tensor lies in two shards")
    return files


def read_store(folder: Path) -> dict[str, Weight]:
    settings = parsed((folder / "config.json").read_bytes())["quantization_config"]
    require(settings["quant_method"] == "bitsandbytes" and settings["load_in_4bit"] is True, "no store")
    tensors = {name: tensor for file in shards(folder).values() for name, tensor in file.items()}
    kinds = {name.partition(STATE)[0]: name.partition(STATE)[2] for name in tensors if STATE in name}
    require(bool(kinds), "nothing in 4 bits")
    parts = {f"{name}.{part}" for name in kinds for part in PARTS} | {f"{n}{STATE}{kind}" for n, kind in kinds.items()}
    return {
        name: _packed(name, kinds[name], tensors) if name in kinds else Weight(as_float32(tensor), None)
        for name, tensor in tensors.items()
        if name not in parts
    }


def as_float32(tensor: Tensor) -> np.ndarray:
    """Exactly the stored values: a bfloat16 is the upper half of a float32."""
    array = tensor.array()
    if tensor.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _packed(name: str, kind: str, tensors: dict[str, Tensor]) -> Weight:
    state = parsed(tensors[f"{name}{STATE}{kind}"].data)
    require(state["quant_type"] == kind, f"{name}: another type")
    n_weights, block_size = prod(state["shape"]), state["blocksize"]
    require(2 <= block_size <= 65_536 and block_size & (block_size - 1) == 0, f"{name}: block size")
    n_blocks = -(-n_weights // block_size)
    codes = np.frombuffer(tensors[name].data, dtype=np.uint8)
    require(len(codes) == -(-n_weights // 2), f"{name}: number of codes")
    nibbles = np.stack((codes >> 4, codes & 15), axis=-1).reshape(-1)[:n_weights]
    levels, absmax = tensors[f"{name}.quant_map"], tensors[f"{name}.absmax"]
    require(levels.array().tobytes() == LEVELS[kind].tobytes(), f"{name}: levels")
    nested = any(key.startswith("nested_") for key in state)
    require((absmax.dtype, absmax.shape) == ("U8" if nested else "F32", (n_blocks,)), f"{name}: absmax")
    scales = absmax.array()
    if nested:
        group = state["nested_blocksize"]
        table, maxima = tensors[f"{name}.nested_quant_map"], tensors[f"{name}.nested_absmax"]
        require(table.shape == (256,) and maxima.shape == (-(-n_blocks // group),), f"{name}: nested sizes")
        scales = table.array()[scales] * maxima.array()[np.arange(n_blocks) // group]
        scales = scales + np.float32(state["nested_offset"])
    values = levels.array()[nibbles] * scales[np.arange(n_weights) // block_size]
    assert values.dtype == np.float32
    return Weight(values.reshape(state["shape"]), state)


def digest_of_header(path: Path) -> str:
    """The digest that the manifest records of a shard's header, its length included."""
    data = path.read_bytes()
    return hashlib.sha256(data[: 8 + struct.unpack("<Q", data[:8])[0]]).hexdigest()


def digest_of_weight(name: str, tensors: dict[str, Tensor]) -> str:
    """The digest that the manifest records of one weight."""
    sha256 = hashlib.sha256(tensors[name].data)
    for part in PARTS:
        if f"{name}.{part}" in tensors:
            sha256.update(tensors[f"{name}.{part}"].data)
    for state in (key for key in tensors if key.startswith(f"{name}{STATE}")):
        sha256.update(tensors[state].data.rstrip(b" "))
    return sha256.hexdigest()


def check_layout(tensors: dict[str, Tensor], *, blocks: list[str]) -> None:
    """The order that a writer keeps to, in one shard; `blocks` are the prefixes of the groups."""
    names = sorted(tensors, key=lambda name: (tensors[name].start, len(tensors[name].data)))
    require(tensors[names[0]].start % 4096 == 0, "the data does not start on a page")
    packed = {name.partition(STATE)[0] for name in names if STATE in name}
    for name in packed:
        require(tensors[name].start % 64 == 0, f"{name} does not start on a multiple of 64")
        (state,) = (key for key in names if key.startswith(f"{name}{STATE}"))
        require(len(tensors[state].data) >= 256, f"{state} is too short")
    for prefix in blocks:
        inside = [place for place, name in enumerate(names) if name.startswith(prefix)]
        if not inside:
            continue
        first, last = names[inside[0]], names[inside[-1]]
        require(inside == [*range(inside[0], inside[-1] + 1)], f"{prefix} is not in one piece")
        if any(name.startswith(prefix) for name in packed):
            require(tensors[first].start % 4096 == 0, f"{prefix} does not start on a page")
            require((tensors[last].start + len(tensors[last].data)) % 4096 == 0, f"{prefix} does not end on a page")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Check a folder's manifest, its digest, and size and hash of every file that it names."""
    manifest = parsed((folder / "qlora_pipe.json").read_bytes())
    require(manifest["format"] == "qlora_pipe" and manifest["version"] == 1, "of another version")
    body = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    require(hashlib.sha256(text.encode()).hexdigest() == manifest["digest"], "the manifest was edited")
    for name, record in manifest["files"].items():
        data = (folder / name).read_bytes()
        require(len(data) == record["bytes"], f"{name} has another size")
        require(hashlib.sha256(data).hexdigest() == record["sha256"], f"{name} was changed")
    return manifest
