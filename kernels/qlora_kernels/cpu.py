"""Which way tensors on a CPU go, and the way through the C library.

The library is built with the package where there is a C compiler; without it plain torch does the same, slower. Its
meaning is blockwise.py, which it equals bit for bit on every instruction set and with any number of threads. For the
shape legend see quantized.py.
"""

import ctypes
import math
import mmap
import os
import sys
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
    checked_offset,
    code_of_position,
    lookup,
    offset_of,
)
from qlora_kernels.levels import Kind, dynamic_map, levels_of, thresholds
from qlora_kernels.library import (
    Comparison,
    Dequantization,
    Intervals,
    NestedQuantization,
    Quantization,
    call,
    library,
    sum_in_torchs_order,
)
from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.threads import in_shares

VARIABLE: Final = "QLORA_PIPE_CPU"

# The C library's numbers and what they are called, the best first.
_PATHS: Final = {"avx512": (2, "AVX-512"), "avx2": (1, "AVX2"), "portable": (0, "no vector instructions")}
DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Elements from which on torch shares a sum out among threads.
_SHARED_OUT_BY_TORCH: Final = 32_768
# Bytes of a tensor that is better put in large pages.
_LARGE: Final = 4 << 20
# Weights that are work for one thread alone, of some 200 microseconds: to wake another takes 50.
_SMALLEST_SHARE: Final = 1 << 20


def description() -> str:
    """What quantizes and dequantizes tensors on a CPU here, in one line."""
    chosen = path()
    if chosen in _PATHS:
        return f"C kernels, {_PATHS[chosen][1]}"
    if library() is None:
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


def path_number() -> int:
    """The C library's number of the path taken, which must not be "torch"."""
    return _PATHS[path()][0]


@cache
def paths() -> tuple[str, ...]:
    """The paths that this processor runs, the fastest first; "torch" runs everywhere."""
    found = library()
    if found is None:
        return ("torch",)
    return (*(name for name, (number, _) in _PATHS.items() if found.runs_path(number)), "torch")


def quantize(weight: Tensor, *, kind: Kind, block_size: int, double_quant: bool) -> QuantizedTensor:
    """As `blockwise.quantize`, of a tensor on a CPU."""
    check_source(weight, block_size)
    flat_N = weight.detach().reshape(-1).contiguous()
    n_blocks = math.ceil(flat_N.numel() / block_size)
    codes_B = _empty((flat_N.numel() + 1) // 2, dtype=torch.uint8)
    absmax_S = _empty(n_blocks, dtype=torch.float32)
    task = Quantization(
        weight=flat_N.data_ptr(),
        n_weights=flat_N.numel(),
        block_size=block_size,
        codes=codes_B.data_ptr(),
        absmax=absmax_S.data_ptr(),
        dtype=DTYPES[weight.dtype],
        path=_PATHS[path()][0],
        intervals=_intervals(kind),
    )
    if not in_shares(call("quantize_blocks", task), n_blocks, smallest=max(1, _SMALLEST_SHARE // block_size)):
        raise ValueError(NOT_FINITE)
    shape, levels = tuple(weight.shape), levels_of(kind)
    if not double_quant:
        return QuantizedTensor(codes_B, absmax_S, levels, None, None, None, block_size, NESTED_BLOCK_SIZE, shape)
    offset = _offset_of(absmax_S)
    groups = math.ceil(n_blocks / NESTED_BLOCK_SIZE)
    nested_codes_S, nested_absmax_G = _empty(n_blocks, dtype=torch.uint8), _empty(groups, dtype=torch.float32)
    code_at = code_of_position()
    nested_task = NestedQuantization(
        absmax=absmax_S.data_ptr(),
        n_blocks=n_blocks,
        code_of_position=code_at.data_ptr(),
        codes=nested_codes_S.data_ptr(),
        nested_absmax=nested_absmax_G.data_ptr(),
        offset=offset.item(),
    )
    in_shares(call("quantize_scales", nested_task), groups, smallest=64)
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
        dtype in DTYPES
        and size % 2 == 0
        and all(
            part.is_cpu and part.dtype == wanted and part.numel() == numel and part.is_contiguous()
            for part, wanted, numel in parts
        )
    )


def dequantize(q: QuantizedTensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """As `blockwise.dequantize_reference`, where `dequantizes` allows it."""
    if out is None:
        out = _empty(*q.shape, dtype=dtype)
    task = dequantization_of(q, dtype, out=out.data_ptr())
    n_blocks = q.absmax.numel()
    in_shares(call("dequantize_blocks", task), n_blocks, smallest=max(1, _SMALLEST_SHARE // q.block_size))
    return out


def dequantization_of(q: QuantizedTensor, dtype: torch.dtype, *, out: int | None) -> Dequantization:
    """What the C library works on; the tensors must outlive it."""

    def address(part: Tensor | None) -> int | None:
        return None if part is None else part.data_ptr()

    return Dequantization(
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
        dtype=DTYPES[dtype],
        path=_PATHS[path()][0],
    )


def squared_error(weight: Tensor, q: QuantizedTensor) -> tuple[float, float]:
    """As `blockwise.squared_error_reference`, of a weight and a `q` that `compares` allows."""
    flat_N = weight.detach().reshape(-1).contiguous()
    pieces = math.ceil(flat_N.numel() / PIECE)
    sums_2P = _empty(2, pieces, dtype=torch.float64)
    task = Comparison(
        approximation=dequantization_of(q, torch.float32, out=None),
        weight=flat_N.data_ptr(),
        errors=sums_2P[0].data_ptr(),
        sizes=sums_2P[1].data_ptr(),
        dtype=DTYPES[weight.dtype],
    )
    in_shares(call("compare_pieces", task), pieces, smallest=_SMALLEST_SHARE // PIECE)
    errors, sizes = sums_2P.tolist()
    return math.fsum(errors), math.fsum(sizes)


def compares(weight: Tensor, q: QuantizedTensor) -> bool:
    """Whether the C library can; what it cannot is left to torch."""
    fits = weight.device.type == "cpu" and weight.dtype in DTYPES and weight.numel() == math.prod(q.shape)
    return fits and q.block_size in BLOCK_SIZES and dequantizes(q, torch.float32)


def _offset_of(absmax_S: Tensor) -> Tensor:
    """As `blockwise.offset_of`, without waking torch's threads, which then keep processors busy for a while."""
    if absmax_S.numel() < _SHARED_OUT_BY_TORCH:
        return checked_offset(absmax_S.mean())
    if not _sums_as_torch_does():
        return offset_of(absmax_S)
    total = sum_in_torchs_order(absmax_S.data_ptr(), absmax_S.numel())
    return checked_offset(torch.tensor(total, dtype=torch.float32, device="cpu") / absmax_S.numel())


@cache
def _sums_as_torch_does() -> bool:
    """Whether the library's order of summation is that of the torch that is installed, on this processor."""
    values = torch.arange(100_003, dtype=torch.float32, device="cpu").sqrt()
    return sum_in_torchs_order(values.data_ptr(), values.numel()) == values.expand(2, -1).sum(dim=1)[0].item()


@cache
def _intervals(kind: Kind) -> Intervals:
    cuts, codes = thresholds(kind)
    # Kept alive by their own cache.
    cut_of_cell, code_of_side = lookup(kind)
    return Intervals(
        cuts=(ctypes.c_float * 15)(*cuts.tolist()),
        codes=(ctypes.c_uint8 * 16)(*codes.tolist()),
        cells_per_unit=CELLS / 2,
        cut_of_cell=cut_of_cell.data_ptr(),
        code_of_side=code_of_side.data_ptr(),
    )


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A new tensor, in large pages if it is large and the system has them: each page that is new costs a fault."""
    out = torch.empty(shape, dtype=dtype, device="cpu")
    if out.nbytes >= _LARGE and sys.platform == "linux":
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (out.data_ptr() + out.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice: a system that cannot follow it says so, and nothing else changes.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return out
