"""How bitsandbytes writes one 4-bit weight `P.weight`: the tensors beside it, and the JSON that explains them.

    P.weight                                    U8 [ceil(N/2), 1], or the same bytes as another storage dtype
    P.weight.absmax                             F32 [blocks]; U8 [blocks] under double quantization
    P.weight.quant_map                          F32 [16], the levels
    P.weight.nested_absmax                      F32 [ceil(blocks/nested block size)], double quantization only
    P.weight.nested_quant_map                   F32 [256], double quantization only
    P.weight.quant_state.bitsandbytes__KIND     U8 [bytes], UTF-8 JSON

with N weights in blocks = ceil(N/block size) blocks.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch

from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.errors import FormatError
from qlora_formats.header import MAX_RANK
from qlora_formats.strict_json import is_int, parse_object
from qlora_formats.tensorfile import TensorInfo, TensorPlan, dtype_name

KINDS = ("nf4", "fp4")
SOURCE_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_DTYPE_NAMES = {dtype: name for name, dtype in SOURCE_DTYPES.items()}
_STATE = ".quant_state.bitsandbytes__"
_COMPONENTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_MAX_BLOCK_SIZE = 2**16
_MAX_STATE_BYTES = 2**16
# The longest that a float32's value gets when Python prints it.
_MAX_OFFSET = "-1.1754943508222875e-38"
_MAX_FLOAT32 = torch.finfo(torch.float32).max
# A number as JSON has it, and of a sane length.
_OFFSET = re.compile(rb'"nested_offset": (-?(?:0|[1-9][0-9]{0,19})(?:\.[0-9]{1,40})?(?:[eE][-+]?[0-9]{1,2})?)(?=[,}])')

_Beside = tuple[str, torch.dtype, tuple[int, ...]]


class QuantState(NamedTuple):
    """What one weight's JSON says. `nested_block_size` and `nested_offset` are None without double quantization."""

    kind: str
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_block_size: int | None = None
    nested_offset: float | None = None

    def to_json(self) -> bytes:
        """The JSON as bitsandbytes writes it, unpadded."""
        fields: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.block_size,
            "dtype": _DTYPE_NAMES[self.dtype],
            "shape": list(self.shape),
        }
        if self.nested_block_size is not None:
            fields["nested_blocksize"] = self.nested_block_size
            fields["nested_dtype"] = "float32"
            fields["nested_offset"] = self.nested_offset
        return json.dumps(fields, allow_nan=False).encode()

    @property
    def longest_json(self) -> int:
        """The bytes that `to_json` can take at most, whatever the offset turns out to be."""
        return len(self._replace(nested_offset=0.0).to_json()) + len(_MAX_OFFSET)


class Parts(NamedTuple):
    """The tensors of one weight by role; each but `codes` has exactly the planned dtype and shape in every file."""

    codes: TensorPlan
    absmax: TensorPlan
    levels: TensorPlan
    nested_absmax: TensorPlan | None
    nested_levels: TensorPlan | None


def parts_of(name: str, state: QuantState) -> Parts:
    """Names, dtypes and shapes of the tensors that store the weight `name`."""
    n_codes, beside = _sizes(state.shape, state.block_size, state.nested_block_size)
    plans = [TensorPlan(f"{name}{component}", dtype, shape) for component, dtype, shape in beside]
    nested = plans[2:] if state.nested_block_size is not None else [None, None]
    return Parts(TensorPlan(name, torch.uint8, (n_codes, 1)), *plans[:2], *nested)


@lru_cache(maxsize=1024)
def _sizes(shape: tuple[int, ...], block_size: int, nested_block_size: int | None) -> tuple[int, list[_Beside]]:
    """Bytes of codes, and the tensors beside them; the same for a weight of every layer."""
    n_weights = prod(shape)
    n_blocks = -(-n_weights // block_size)
    scale_dtype = torch.uint8 if nested_block_size else torch.float32
    beside: list[_Beside] = [(".absmax", scale_dtype, (n_blocks,)), (".quant_map", torch.float32, (16,))]
    if nested_block_size:
        beside.append((".nested_absmax", torch.float32, (-(-n_blocks // nested_block_size),)))
        beside.append((".nested_quant_map", torch.float32, (256,)))
    return -(-n_weights // 2), beside


def state_name(name: str, kind: str) -> str:
    """The name of the tensor that holds the JSON of the weight `name`."""
    return f"{name}{_STATE}{kind}"


def is_state(name: str) -> bool:
    """Whether a tensor of this name is the JSON of a 4-bit weight."""
    return _STATE in name


def components_of(name: str) -> list[str]:
    """The names that the scales and levels of the weight `name` have, in the order of `Parts`, nested ones included."""
    return [f"{name}{component}" for component in _COMPONENTS]


def parse_quant_state(data: bytes, *, kind: str, what: str) -> QuantState:
    """Read one weight's JSON; FormatError names the weight (`what`) and the field."""
    fields = parse_object(data, what=f"{what}: quant_state")
    missing = [key for key in ("quant_type", "blocksize", "dtype", "shape") if key not in fields]
    if missing:
        raise FormatError(f"{what}: quant_state lacks {missing[0]}")
    if kind not in KINDS or fields["quant_type"] != kind:
        raise FormatError(f"{what}: quant_state has quant_type {_shown(fields['quant_type'])}, named {kind[:20]!r}")
    block_size, dtype, shape = fields["blocksize"], fields["dtype"], fields["shape"]
    _require_block_size(block_size, f"{what}: quant_state has blocksize")
    if not isinstance(dtype, str) or dtype not in SOURCE_DTYPES:
        known = ", ".join(SOURCE_DTYPES)
        raise FormatError(f"{what}: quant_state has dtype {_shown(dtype)}, which is none of {known}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_RANK:
        raise FormatError(f"{what}: quant_state has shape {_shown(shape)}, which is no list of 1 to {MAX_RANK} sizes")
    if not all(is_int(size) and size > 0 for size in shape) or prod(shape) >= 2**62:
        raise FormatError(f"{what}: quant_state has shape {_shown(shape)}, whose sizes make no sense")
    plain = QuantState(kind, block_size, SOURCE_DTYPES[dtype], tuple(shape))
    return _nested(plain, fields, what) if any(key.startswith("nested_") for key in fields) else plain


def read_states(folder: CheckpointFolder) -> dict[str, QuantState]:
    """The JSON of every 4-bit weight of a folder, with the tensors beside each checked against it.

    Nothing is mapped. FormatError names the weight and the field or tensor that is wrong.
    """
    infos = folder.infos
    kinds: dict[str, str] = {}
    for name in infos:
        if _STATE not in name or name.endswith(_COMPONENTS):
            continue
        weight, _, kind = name.rpartition(_STATE)
        if weight in kinds or weight not in infos:
            fault = "two quant_states" if weight in kinds else "a quant_state but no codes"
            raise FormatError(f"{folder.path}: weight {weight!r} has {fault}")
        if _STATE in weight or (weight.endswith(_COMPONENTS) and weight.rpartition(".")[0] in infos):
            raise FormatError(
                f"{folder.path}: weight {weight!r} has a quant_state, although it is itself a part of another weight"
            )
        dtype, shape, start, end = infos[name]
        if dtype != torch.uint8 or len(shape) != 1 or end - start > _MAX_STATE_BYTES:
            raise FormatError(
                f"{folder.path}: weight {weight!r}: quant_state is no list of at most {_MAX_STATE_BYTES:,} bytes (U8)"
            )
        kinds[weight] = kind
    for name in infos:
        if name.endswith(_COMPONENTS):
            weight = name.rpartition(".")[0]
            if weight not in kinds and weight in infos:
                raise FormatError(f"{folder.path}: weight {weight!r} has {name!r} but no quant_state")
    states: dict[str, QuantState] = {}
    known: dict[tuple[bytes, str], QuantState] = {}
    for name, data in folder.read(state_name(weight, kind) for weight, kind in kinds.items()):
        weight = name.rpartition(_STATE)[0]
        what = f"{folder.path}: weight {weight!r}"
        states[weight] = _parse_alike(data, known, kind=kinds[weight], what=what)
        _check_sizes(infos, weight, states[weight], what)
    return states


def _parse_alike(data: bytes, known: dict[tuple[bytes, str], QuantState], *, kind: str, what: str) -> QuantState:
    """As `parse_quant_state`, but that JSON which differs from one in `known` by its offset alone isn't parsed again.

    That is so for the same weight of every layer.
    """
    # A flat object without escapes, in which the key stands once, can mean that key only in one way.
    plain = data.count(b"{") == 1 and data.count(b"nested_offset") == 1 and b"\\" not in data
    match = _OFFSET.search(data) if plain else None
    if match is None:
        return parse_quant_state(data, kind=kind, what=what)
    alike = (data[: match.start(1)] + b"0" + data[match.end(1) :].rstrip(b" "), kind)
    if alike not in known:
        known[alike] = parse_quant_state(alike[0], kind=kind, what=what)
    return QuantState(*known[alike][:-1], _checked_offset(float(match[1]), what))


def _check_sizes(infos: Mapping[str, TensorInfo], weight: str, state: QuantState, what: str) -> None:
    n_codes, beside = _sizes(state.shape, state.block_size, state.nested_block_size)
    packed = infos[weight]
    if packed.end - packed.start != n_codes:
        raise FormatError(
            f"{what}: shape {list(state.shape)} in its quant_state needs {n_codes:,} packed bytes,"
            f" and the file holds {packed.end - packed.start:,}"
        )
    for component, dtype, shape in beside:
        info = infos.get(weight + component)
        if info is None:
            raise FormatError(f"{what} lacks its {component[1:]}")
        if info.shape != shape or info.dtype != dtype:
            raise FormatError(
                f"{what}: {component[1:]} is {dtype_name(info.dtype)} {list(info.shape)}"
                f" where {dtype_name(dtype)} {list(shape)} is needed"
            )


def _nested(plain: QuantState, fields: Mapping[str, Any], what: str) -> QuantState:
    missing = [key for key in ("nested_blocksize", "nested_dtype", "nested_offset") if key not in fields]
    if missing:
        raise FormatError(f"{what}: quant_state lacks {missing[0]}")
    block_size, dtype, offset = fields["nested_blocksize"], fields["nested_dtype"], fields["nested_offset"]
    _require_block_size(block_size, f"{what}: quant_state has nested_blocksize")
    if dtype != "float32":
        raise FormatError(f"{what}: quant_state has nested_dtype {_shown(dtype)}; only float32 is read")
    return plain._replace(nested_block_size=block_size, nested_offset=_checked_offset(offset, what))


def _checked_offset(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _MAX_FLOAT32:
        raise FormatError(f"{what}: quant_state has nested_offset {_shown(value)}, which is no float32")
    return float(value)


def _require_block_size(value: Any, where: str) -> None:
    if not is_int(value) or not 1 < value <= _MAX_BLOCK_SIZE or value & (value - 1):
        raise FormatError(f"{where} {_shown(value)}, which is no power of two from 2 to {_MAX_BLOCK_SIZE:,}")


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
