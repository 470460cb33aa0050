"""Stores of real shapes that take a few MB of disk: all the headers, JSON and manifests, and holes for the weights."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_formats.checkpoint import CONFIG, INDEX, shard_names
from qlora_formats.layout import PAGE_BYTES, Piece, StorePlan, place
from qlora_formats.manifest import MANIFEST, FileRecord, Manifest
from qlora_formats.store_writing import quantization_config
from qlora_formats.strict_json import pretty
from qlora_formats.tensorfile import header_bytes

_MIB = 2**20


class Shape(NamedTuple):
    """The sizes of a LLaMA that decide what its store holds."""

    layers: int
    hidden: int
    inner: int
    key_value: int
    vocabulary: int


SHAPES = {
    "1B": Shape(16, 2048, 8192, 512, 128_256),
    "8B": Shape(32, 4096, 14_336, 1024, 128_256),
    "70B": Shape(80, 8192, 28_672, 1024, 128_256),
    "405B": Shape(126, 16_384, 53_248, 1024, 128_256),
}


def hollow_store(folder: Path, shape: Shape, *, shard_mib: int) -> Path:
    """Make a store of this shape, NF4 with double quantization; the digests in its manifest are of nothing."""
    plan = StorePlan.of(
        [(name, torch.bfloat16, sizes) for name, sizes in _weights(shape)],
        block_of=lambda name: ".".join(name.split(".")[:3]) + "." if name.startswith("model.layers.") else None,
        is_quantized=lambda name: name.endswith("_proj.weight"),
        kind="nf4",
        block_size=64,
        double_quant=True,
        skip_modules=["lm_head"],
    )
    states = {
        # Offsets differ from weight to weight in a real store, too.
        weight.name: plan.state(weight)._replace(nested_offset=0.01 + number / 7919).to_json()
        for number, weight in enumerate(plan.weights)
    }
    shards = place(plan, shard_bytes=shard_mib * _MIB)
    names = shard_names(len(shards))
    small = {CONFIG: {"model_type": "llama", "quantization_config": quantization_config(plan)}}
    if len(shards) > 1:
        placed = {piece.plan.name: name for name, pieces in zip(names, shards, strict=True) for piece in pieces}
        small[INDEX] = {"metadata": {}, "weight_map": placed}
    folder.mkdir(parents=True)
    records = {}
    for name, content in small.items():
        (folder / name).write_bytes(pretty(content))
        records[name] = FileRecord(len(pretty(content)), _digest(name))
    for name, pieces in zip(names, shards, strict=True):
        n_bytes = _write_hollow(folder / name, pieces, states)
        tensors = {piece.weight: _facts(piece) for piece in pieces if piece.part in {"codes", "tensor"}}
        records[name] = FileRecord(n_bytes, _digest(name), {"tensors": tensors})
    inputs = {"source": {"repo": "org/model", "revision": "0" * 40}, "settings": {"block_size": 64, "type": "nf4"}}
    manifest = Manifest.build(kind="store", inputs=inputs, files=records, fields={})
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return folder


def _weights(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, key_value = shape.hidden, shape.inner, shape.key_value
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for number in range(shape.layers):
        for name, sizes in layer.items():
            yield f"model.layers.{number}.{name}.weight", sizes
    yield "model.norm.weight", (hidden,)
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    yield "lm_head.weight", (shape.vocabulary, hidden)


def _write_hollow(path: Path, pieces: Sequence[Piece], states: Mapping[str, bytes]) -> int:
    with path.open("wb") as file:
        file.write(header_bytes([piece.plan for piece in pieces], metadata={"format": "pt"}, alignment=PAGE_BYTES))
        for plan, weight, part in pieces:
            if part == "state":
                file.write(states[weight].ljust(plan.n_bytes))
            else:
                file.seek(plan.n_bytes, 1)
        return file.truncate()


def _facts(piece: Piece) -> dict[str, Any]:
    error = {"relative_error": 0.0921} if piece.part == "codes" else {}
    return {"sha256": _digest(piece.weight), **error}


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
