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
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch

from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.errors import FormatError
from qlora_formats.header import MAX_RANK
from qlora_formats.strict_json import is_int, parse_object
from qlora_formats.tensorfile import TensorPlan, dtype_name

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
    n_weights = prod(state.shape)
    n_blocks = -(-n_weights // state.block_size)
    nested = state.nested_block_size
    return Parts(
        codes=TensorPlan(name, torch.uint8, (-(-n_weights // 2), 1)),
        absmax=TensorPlan(f"{name}.absmax", torch.uint8 if nested else torch.float32, (n_blocks,)),
        levels=TensorPlan(f"{name}.quant_map", torch.float32, (16,)),
        nested_absmax=TensorPlan(f"{name}.nested_absmax", torch.float32, (-(-n_blocks // nested),)) if nested else None,
        nested_levels=TensorPlan(f"{name}.nested_quant_map", torch.float32, (256,)) if nested else None,
    )


def state_name(name: str, kind: str) -> str:
    """The name of the tensor that holds the JSON of the weight `name`."""
    return f"{name}{_STATE}{kind}"


def weight_of_state(name: str) -> tuple[str, str] | None:
    """The weight and the kind that a tensor named `name` is the JSON of; None for any other tensor."""
    weight, found, kind = name.rpartition(_STATE)
    return (weight, kind) if found else None


def weight_of_component(name: str) -> str | None:
    """The weight that a tensor named `name` would be the scales or levels of; None for any other tensor."""
    weight, dot, last = name.rpartition(".")
    return weight if weight and f"{dot}{last}" in _COMPONENTS else None


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

    FormatError names the weight and the field or tensor that is wrong.
    """
    names = set(folder.names)
    states: dict[str, QuantState] = {}
    for name in folder.names:
        weight, kind = weight_of_state(name) or (None, "")
        if weight is None:
            continue
        what = f"{folder.path}: weight {weight!r}"
        if weight in states or weight not in names:
            raise FormatError(f"{what} has {'two quant_states' if weight in states else 'a quant_state but no codes'}")
        info = folder.info(name)
        if info.dtype != torch.uint8 or len(info.shape) != 1 or info.end - info.start > _MAX_STATE_BYTES:
            raise FormatError(f"{what}: quant_state is no list of at most {_MAX_STATE_BYTES:,} bytes (U8)")
        states[weight] = parse_quant_state(folder.tensor(name).numpy().tobytes(), kind=kind, what=what)
        _check_parts(folder, weight, states[weight], names, what)
    for name in folder.names:
        weight = weight_of_component(name)
        if weight in names and weight not in states:
            raise FormatError(f"{folder.path}: weight {weight!r} has {name!r} but no quant_state")
    return states


def _check_parts(folder: CheckpointFolder, weight: str, state: QuantState, names: set[str], what: str) -> None:
    parts = parts_of(weight, state)
    packed = folder.info(weight)
    if packed.end - packed.start != parts.codes.n_bytes:
        raise FormatError(
            f"{what}: shape {list(state.shape)} in its quant_state needs {parts.codes.n_bytes:,} packed bytes,"
            f" and the file holds {packed.end - packed.start:,}"
        )
    for plan in parts[1:]:
        if plan is None:
            continue
        if plan.name not in names:
            raise FormatError(f"{what} lacks its {plan.name.removeprefix(f'{weight}.')}")
        info = folder.info(plan.name)
        if info[:2] != plan[1:]:
            raise FormatError(
                f"{what}: {plan.name.removeprefix(f'{weight}.')} is {dtype_name(info.dtype)} {list(info.shape)}"
                f" where {dtype_name(plan.dtype)} {list(plan.shape)} is needed"
            )


def _nested(plain: QuantState, fields: Mapping[str, Any], what: str) -> QuantState:
    missing = [key for key in ("nested_blocksize", "nested_dtype", "nested_offset") if key not in fields]
    if missing:
        raise FormatError(f"{what}: quant_state lacks {missing[0]}")
    block_size, dtype, offset = fields["nested_blocksize"], fields["nested_dtype"], fields["nested_offset"]
    _require_block_size(block_size, f"{what}: quant_state has nested_blocksize")
    if dtype != "float32":
        raise FormatError(f"{what}: quant_state has nested_dtype {_shown(dtype)}; only float32 is read")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or abs(offset) > torch.finfo(torch.float32).max:
        raise FormatError(f"{what}: quant_state has nested_offset {_shown(offset)}, which is no float32")
    return plain._replace(nested_block_size=block_size, nested_offset=float(offset))


def _require_block_size(value: Any, where: str) -> None:
    if not is_int(value) or not 1 < value <= _MAX_BLOCK_SIZE or value & (value - 1):
        raise FormatError(f"{where} {_shown(value)}, which is no power of two from 2 to {_MAX_BLOCK_SIZE:,}")


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
