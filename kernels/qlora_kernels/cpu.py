"""Which way tensors on a CPU go, and the way through the C library.

The library is built with the package where there is a C compiler; without it plain torch does the same, slower. Its
meaning is blockwise.py, which it equals bit for bit on every instruction set and with any number of threads. For the
shape legend see quantized.py.
"""

import ctypes
import importlib.util
import math
import os
from collections.abc import Callable
from functools import cache
from typing import Final

import torch
from torch import Tensor

from qlora_kernels.blockwise import (
    BLOCK_SIZES,
    CELLS,
    NESTED_BLOCK_SIZE,
    NOT_FINITE,
    PIECE,
    check_source,
    code_of_position,
    lookup,
    offset_of,
)
from qlora_kernels.levels import Kind, dynamic_map, levels_of, thresholds
from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.threads import in_shares

VARIABLE: Final = "QLORA_PIPE_CPU"

# The C library's numbers and what they are called, the best first.
_PATHS: Final = {"avx512": (2, "AVX-512"), "avx2": (1, "AVX2"), "portable": (0, "no vector instructions")}
_DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# That of the C library that the structures below fit.
_INTERFACE: Final = 3
# Weights that are work for one thread alone: some 50 microseconds.
_SMALLEST_SHARE: Final = 1 << 18


def description() -> str:
    """What quantizes and dequantizes tensors on a CPU here, in one line."""
    chosen = path()
    if chosen in _PATHS:
        return f"C kernels, {_PATHS[chosen][1]}"
    if _library() is None:
        return (
            "plain torch: the C kernels, many times faster, were not built; install a C compiler, then qlora-pipe again"
        )
    return f"plain torch, as {VARIABLE} asks"


def path() -> str:
    """The path taken: one of `paths()`, that which QLORA_PIPE_CPU names or else the first.

    Raises ValueError if it names one that is not to be had.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted == "torch":
        return wanted
    possible = paths()
    if not wanted:
        return possible[0]
    if wanted not in possible:
        raise ValueError(f"{VARIABLE}={wanted} asks for what is not to be had here: choose {' or '.join(possible)}")
    return wanted


@cache
def paths() -> tuple[str, ...]:
    """The paths that this processor runs, the fastest first; "torch" runs everywhere."""
    library = _library()
    if library is None:
        return ("torch",)
    return (*(name for name, (number, _) in _PATHS.items() if library.runs_path(number)), "torch")


def quantize(weight: Tensor, *, kind: Kind, block_size: int, double_quant: bool) -> QuantizedTensor:
    """As `blockwise.quantize`, of a tensor on a CPU."""
    check_source(weight, block_size)
    flat_N = weight.detach().reshape(-1).contiguous()
    n_blocks = math.ceil(flat_N.numel() / block_size)
    codes_B = torch.empty((flat_N.numel() + 1) // 2, dtype=torch.uint8)
    absmax_S = torch.empty(n_blocks)
    cuts, code_of_interval = thresholds(kind)
    cut_of_cell, code_of_side = lookup(kind)
    task = _Quantization(
        weight=flat_N.data_ptr(),
        n_weights=flat_N.numel(),
        block_size=block_size,
        codes=codes_B.data_ptr(),
        absmax=absmax_S.data_ptr(),
        dtype=_DTYPES[weight.dtype],
        path=_PATHS[path()][0],
        cuts=(ctypes.c_float * 15)(*cuts.tolist()),
        code_of_interval=(ctypes.c_uint8 * 16)(*code_of_interval.tolist()),
        cells_per_unit=CELLS / 2,
        cut_of_cell=cut_of_cell.data_ptr(),
        code_of_side=code_of_side.data_ptr(),
    )
    if not in_shares(_call("quantize_blocks", task), n_blocks, smallest=max(1, _SMALLEST_SHARE // block_size)):
        raise ValueError(NOT_FINITE)
    shape, levels = tuple(weight.shape), levels_of(kind)
    if not double_quant:
        return QuantizedTensor(codes_B, absmax_S, levels, None, None, None, block_size, NESTED_BLOCK_SIZE, shape)
    offset = offset_of(absmax_S)
    groups = math.ceil(n_blocks / NESTED_BLOCK_SIZE)
    nested_codes_S, nested_absmax_G = torch.empty(n_blocks, dtype=torch.uint8), torch.empty(groups)
    code_at = code_of_position()
    nested_task = _NestedQuantization(
        absmax=absmax_S.data_ptr(),
        n_blocks=n_blocks,
        code_of_position=code_at.data_ptr(),
        codes=nested_codes_S.data_ptr(),
        nested_absmax=nested_absmax_G.data_ptr(),
        offset=offset.item(),
    )
    in_shares(_call("quantize_scales", nested_task), groups, smallest=64)
    return QuantizedTensor(
        codes_B, nested_codes_S, levels, nested_absmax_G, dynamic_map(), offset, block_size, NESTED_BLOCK_SIZE, shape
    )


def dequantizes(q: QuantizedTensor, dtype: torch.dtype) -> bool:
    """Whether the C library can: `q` must be whole, on a CPU, flat and contiguous. What is not is left to torch."""
    n, size = math.prod(q.shape), q.block_size
    n_blocks = math.ceil(n / size)
    parts = [(q.codes, torch.uint8, (n + 1) // 2), (q.levels, torch.float32, 16)]
    if q.nested_absmax is None or q.nested_levels is None or q.offset is None:
        parts.append((q.absmax, torch.float32, n_blocks))
    else:
        groups = math.ceil(n_blocks / q.nested_block_size)
        parts += [
            (q.absmax, torch.uint8, n_blocks),
            (q.nested_absmax, torch.float32, groups),
            (q.nested_levels, torch.float32, 256),
            (q.offset, torch.float32, 1),
        ]
    return (
        dtype in _DTYPES
        and size % 2 == 0
        and all(
            part.device.type == "cpu" and part.dtype == wanted and part.numel() == numel and part.is_contiguous()
            for part, wanted, numel in parts
        )
    )


def dequantize(q: QuantizedTensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """As `blockwise.dequantize_reference`, where `dequantizes` allows it."""
    if out is None:
        out = torch.empty(q.shape, dtype=dtype)
    task = _dequantization(q, dtype, out=out.data_ptr())
    n_blocks = q.absmax.numel()
    in_shares(_call("dequantize_blocks", task), n_blocks, smallest=max(1, _SMALLEST_SHARE // q.block_size))
    return out


def squared_error(weight: Tensor, q: QuantizedTensor) -> tuple[float, float]:
    """As `blockwise.squared_error_reference`, of a weight and a `q` that `compares` allows."""
    flat_N = weight.detach().reshape(-1).contiguous()
    pieces = math.ceil(flat_N.numel() / PIECE)
    sums_2P = torch.empty(2, pieces, dtype=torch.float64)
    task = _Comparison(
        approximation=_dequantization(q, torch.float32, out=None),
        weight=flat_N.data_ptr(),
        errors=sums_2P[0].data_ptr(),
        sizes=sums_2P[1].data_ptr(),
        dtype=_DTYPES[weight.dtype],
    )
    in_shares(_call("compare_pieces", task), pieces, smallest=_SMALLEST_SHARE // PIECE)
    errors, sizes = sums_2P.tolist()
    return math.fsum(errors), math.fsum(sizes)


def compares(weight: Tensor, q: QuantizedTensor) -> bool:
    """Whether the C library can; what it cannot is left to torch."""
    fits = weight.device.type == "cpu" and weight.dtype in _DTYPES and weight.numel() == math.prod(q.shape)
    return fits and q.block_size in BLOCK_SIZES and dequantizes(q, torch.float32)


class _Quantization(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("n_weights", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("path", ctypes.c_int32),
        ("cuts", ctypes.c_float * 15),
        ("code_of_interval", ctypes.c_uint8 * 16),
        ("cells_per_unit", ctypes.c_float),
        ("cut_of_cell", ctypes.c_void_p),
        ("code_of_side", ctypes.c_void_p),
    )


class _NestedQuantization(ctypes.Structure):
    _fields_ = (
        ("absmax", ctypes.c_void_p),
        ("n_blocks", ctypes.c_int64),
        ("code_of_position", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_float),
    )


class _Dequantization(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_levels", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("n_weights", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("nested_block_size", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("path", ctypes.c_int32),
    )


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("approximation", _Dequantization),
        ("weight", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
    )


def _dequantization(q: QuantizedTensor, dtype: torch.dtype, *, out: int | None) -> _Dequantization:
    def address(part: Tensor | None) -> int | None:
        return None if part is None else part.data_ptr()

    return _Dequantization(
        codes=q.codes.data_ptr(),
        absmax=q.absmax.data_ptr(),
        levels=q.levels.data_ptr(),
        nested_absmax=address(q.nested_absmax),
        nested_levels=address(q.nested_levels),
        offset=address(q.offset),
        n_weights=math.prod(q.shape),
        block_size=q.block_size,
        nested_block_size=q.nested_block_size,
        out=out,
        dtype=_DTYPES[dtype],
        path=_PATHS[path()][0],
    )


def _call(name: str, task: ctypes.Structure) -> Callable[[int, int], bool]:
    function = getattr(_library(), name)

    def work(start: int, stop: int) -> bool:
        return bool(function(ctypes.byref(task), start, stop))

    return work


@cache
def _library() -> ctypes.CDLL | None:
    """The C library, or None if it was not built, or was built from other sources than these."""
    spec = importlib.util.find_spec("qlora_kernels._blockwise")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    if ctypes.c_int32.in_dll(library, "interface").value != _INTERFACE:
        return None
    library.runs_path.argtypes = [ctypes.c_int32]
    for name in ("quantize_blocks", "quantize_scales", "dequantize_blocks", "compare_pieces"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return library
