"""Writing a 4-bit store: bitsandbytes' serialised layout in our own byte order, weight by weight."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_formats.ahead import in_order
from qlora_formats.checkpoint import CONFIG, shard_names, write_index
from qlora_formats.commit import PartialFolder
from qlora_formats.layout import PAGE_BYTES, Piece, StorePlan, place
from qlora_formats.quant_state import QuantState
from qlora_formats.store import StoredWeight
from qlora_formats.strict_json import pretty
from qlora_formats.tensorfile import ByteSink, TensorPlan, header_bytes, tensor_bytes

_MIB = 2**20


class _Made(NamedTuple):
    """One weight, ready to be written, and what is to be remembered of it."""

    name: str
    value: StoredWeight | Tensor
    known: dict[str, Any]


def write_store(
    folder: PartialFolder,
    *,
    config: Mapping[str, Any],
    plan: StorePlan,
    produce: Callable[[str], StoredWeight | Tensor],
    facts: Callable[[str], Mapping[str, Any]] = lambda _: {},
    written: Callable[[str], None] = lambda _: None,
    shard_mib: int = 4096,
    ahead_bytes: int = 0,
    threads: int = 1,
) -> dict[str, dict[str, Any]]:
    """Write config.json, with the quantization_config that transformers writes, and the weights, shard by shard.

    `produce` is asked for each weight once, in the order of the file, from `threads` threads: ahead of the writing by
    as many weights as have `ahead_bytes` in the source, or else by none. Packed codes are let go as soon as they are
    written, so memory holds a few weights and never the model. `facts(name)` is asked right after, by the same thread:
    what it says, such as the weight's error, is kept with a digest of the weight's bytes in the journal and the
    manifest, beside the shard. `written(name)` is called when a weight's bytes, but for its scales, are written. Shards
    in `folder.done` are left as they are. Returns the facts of all weights by name. The caller copies what else belongs
    to a model (`carried_files`) and finishes the folder.
    """
    shards = place(plan, shard_bytes=shard_mib * _MIB)
    names = shard_names(len(shards))
    layouts = dict(zip(names, shards, strict=True))
    missing = {name: pieces for name, pieces in layouts.items() if name not in folder.done}
    order = [piece.weight for pieces in missing.values() for piece in pieces if piece.part in ("tensor", "codes")]
    source_bytes = {weight.name: prod(weight.shape) * weight.dtype.itemsize for weight in plan.weights}

    def make(name: str) -> _Made:
        value = produce(name)
        return _Made(name, value, {"sha256": _digest(value), **facts(name)})

    coming = in_order(order, make, cost=source_bytes.__getitem__, budget=ahead_bytes, threads=threads)
    with closing(coming):
        for name, pieces in missing.items():
            _write_shard(folder, name, pieces, coming, written)
    write_index(folder, {name: [piece.plan for piece in pieces] for name, pieces in layouts.items()})
    folder.write(CONFIG, pretty({**config, "quantization_config": quantization_config(plan)}))
    return {weight: known for name in names for weight, known in folder.done[name].facts["tensors"].items()}


def quantization_config(plan: StorePlan) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig says of such a store.

    The compute dtype is float32 where the source is, since the reader would round every product otherwise.
    """
    single = any(weight.quantized and weight.dtype == torch.float32 for weight in plan.weights)
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "float32" if single else "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": plan.kind,
        "bnb_4bit_use_double_quant": plan.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(plan.skip_modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _write_shard(
    folder: PartialFolder,
    name: str,
    pieces: Sequence[Piece],
    coming: Iterator[_Made],
    written: Callable[[str], None],
) -> None:
    known: dict[str, dict[str, Any]] = {}
    # The scales of weights whose codes are written; each is let go after the last of its pieces.
    held: dict[str, StoredWeight] = {}
    last = {piece.weight: index for index, piece in enumerate(pieces)}
    with folder.create(name) as stream:
        header = header_bytes([piece.plan for piece in pieces], metadata={"format": "pt"}, alignment=PAGE_BYTES)
        stream.write(header)
        for index, (plan, weight, part) in enumerate(pieces):
            data: Tensor | bytes
            # A kept tensor is one piece; of a packed weight the codes come first and are let go at once.
            if part in ("tensor", "codes"):
                made = next(coming)
                assert made.name == weight, (made.name, weight)
                known[weight] = made.known
                if isinstance(made.value, StoredWeight):
                    data = made.value.codes.view(plan.shape)
                    held[weight] = made.value._replace(codes=torch.empty(0))
                else:
                    data = made.value
                del made
            elif part == "state":
                data = _state(held[weight]).to_json().ljust(plan.n_bytes)
            else:
                data = held[weight]._asdict()[part]
            _write_tensor(stream, plan, data)
            del data
            if part in ("tensor", "codes"):
                written(weight)
            if index == last[weight]:
                held.pop(weight, None)
        stream.facts.update(header=hashlib.sha256(header).hexdigest(), tensors=known)


def _write_tensor(stream: ByteSink, plan: TensorPlan, data: Tensor | bytes) -> None:
    # A function of its own, so that nothing holds on to the bytes of a piece while the next one is made.
    for chunk in tensor_bytes(plan, data):
        stream.write(chunk)


def _state(weight: StoredWeight) -> QuantState:
    nested = (weight.nested_block_size, weight.offset.item()) if weight.offset is not None else (None, None)
    return QuantState(weight.kind, weight.block_size, weight.dtype, weight.shape, *nested)


def _digest(value: StoredWeight | Tensor) -> str:
    """Of a packed weight: codes, absmax, levels, nested absmax and levels, and the JSON; of another: its bytes."""
    if isinstance(value, StoredWeight):
        scales = (value.absmax, value.levels, value.nested_absmax, value.nested_levels)
        parts = [value.codes, *(part for part in scales if part is not None)]
        tail = _state(value).to_json()
    else:
        parts, tail = [value], b""
    sha256 = hashlib.sha256()
    for part in parts:
        for chunk in tensor_bytes(TensorPlan("", part.dtype, tuple(part.shape)), part):
            sha256.update(chunk)
    sha256.update(tail)
    return sha256.hexdigest()
