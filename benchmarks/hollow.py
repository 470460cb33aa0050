"""Stores of real shapes: all headers, JSON and manifests, and for the weights holes, which take no disk, or noise."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from qlora_formats.checkpoint import CONFIG, INDEX, shard_names
from qlora_formats.layout import PAGE_BYTES, Piece, StorePlan, place
from qlora_formats.manifest import MANIFEST, FileRecord, Manifest
from qlora_formats.store_writing import quantization_config
from qlora_formats.strict_json import pretty
from qlora_formats.tensorfile import header_bytes
from qlora_kernels.levels import dynamic_map, levels_of

_MIB = 2**20
# A norm is smaller, a matrix larger.
_LARGEST_SMALL = 2**18
_NOISE_BYTES = 2**24


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
    "65B": Shape(80, 8192, 22_016, 8192, 32_000),
    "2-70B": Shape(80, 8192, 28_672, 1024, 32_000),
    "70B": Shape(80, 8192, 28_672, 1024, 128_256),
    "405B": Shape(126, 16_384, 53_248, 1024, 128_256),
}


_HEAD_DIM = 128

Content = Literal["holes", "tables", "noise"]


def hollow_store(folder: Path, shape: Shape, *, shard_mib: int, content: Content = "holes") -> Path:
    """Make a store of this shape, NF4 with double quantization; the digests in its manifest are of nothing.

    `content`: nothing; what is small, so that it can be loaded and computed with; or all of it, random.
    """
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
    small = {CONFIG: {**_config(shape), "quantization_config": quantization_config(plan)}}
    if len(shards) > 1:
        placed = {piece.plan.name: name for name, pieces in zip(names, shards, strict=True) for piece in pieces}
        small[INDEX] = {"metadata": {}, "weight_map": placed}
    folder.mkdir(parents=True)
    records = {}
    for name, written in small.items():
        (folder / name).write_bytes(pretty(written))
        records[name] = FileRecord(len(pretty(written)), _digest(name))
    for name, pieces in zip(names, shards, strict=True):
        n_bytes = _write(folder / name, pieces, states, content)
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


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": max(1, shape.hidden // _HEAD_DIM),
        "num_key_value_heads": max(1, shape.key_value // _HEAD_DIM),
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _write(path: Path, pieces: Sequence[Piece], states: Mapping[str, bytes], content: Content) -> int:
    with path.open("wb") as file:
        file.write(header_bytes([piece.plan for piece in pieces], metadata={"format": "pt"}, alignment=PAGE_BYTES))
        for plan, weight, part in pieces:
            if part == "state":
                file.write(states[weight].ljust(plan.n_bytes))
            elif content == "holes" or (content == "tables" and plan.n_bytes > _LARGEST_SMALL):
                file.seek(plan.n_bytes, 1)
            else:
                for chunk in _values(plan.n_bytes, plan.dtype, part):
                    file.write(chunk)
        return file.truncate()


def _values(n_bytes: int, dtype: torch.dtype, part: str) -> Iterator[memoryview]:
    """What a tensor may hold: tables that are right, and scales and weights of a sane size."""
    n = n_bytes // dtype.itemsize
    if part == "levels":
        yield _bytes(levels_of("nf4"))
    elif part == "nested_levels":
        yield _bytes(dynamic_map())
    elif part == "nested_absmax":
        yield _bytes(torch.full((n,), 0.002))
    elif part == "tensor" and n_bytes <= _LARGEST_SMALL:
        yield _bytes(torch.ones(n, dtype=dtype))
    else:
        noise = _noise(torch.uint8 if part in {"codes", "absmax"} else dtype)
        while n_bytes:
            chunk = noise[:n_bytes]
            n_bytes -= len(chunk)
            yield chunk


@cache
def _noise(dtype: torch.dtype) -> memoryview:
    draws = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return _bytes(torch.randint(0, 256, (_NOISE_BYTES,), dtype=dtype, generator=draws))
    return _bytes((torch.randn(_NOISE_BYTES // dtype.itemsize, generator=draws) * 0.02).to(dtype))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _facts(piece: Piece) -> dict[str, Any]:
    error = {"relative_error": 0.0921} if piece.part == "codes" else {}
    return {"sha256": _digest(piece.weight), **error}


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
