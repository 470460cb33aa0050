"""The C library as ctypes sees it: the structures that it takes, and its functions."""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Final

# That of the library which the structures below fit.
INTERFACE: Final = 5


class Intervals(ctypes.Structure):
    _fields_ = (
        ("cuts", ctypes.c_float * 15),
        ("codes", ctypes.c_uint8 * 16),
        ("cells_per_unit", ctypes.c_float),
        ("cut_of_cell", ctypes.c_void_p),
        ("code_of_side", ctypes.c_void_p),
    )


class Quantization(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("n_weights", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("path", ctypes.c_int32),
        ("intervals", Intervals),
    )


class NestedQuantization(ctypes.Structure):
    _fields_ = (
        ("absmax", ctypes.c_void_p),
        ("n_blocks", ctypes.c_int64),
        ("code_of_position", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_float),
    )


class Dequantization(ctypes.Structure):
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


class Comparison(ctypes.Structure):
    _fields_ = (
        ("approximation", Dequantization),
        ("weight", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
    )


class Multiplication(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p),
        ("vectors", ctypes.c_void_p),
        ("n_vectors", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("matrices", ctypes.POINTER(Dequantization)),
        ("n_matrices", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None if it was not built, or was built from other sources than these."""
    files = [Path(__file__).with_name(f"_blockwise{suffix}") for suffix in EXTENSION_SUFFIXES]
    built = [file for file in files if file.exists()]
    if not built:
        return None
    found = ctypes.CDLL(str(built[0]))
    if ctypes.c_int32.in_dll(found, "interface").value != INTERFACE:
        return None
    found.runs_path.argtypes = [ctypes.c_int32]
    found.sum_in_torchs_order.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    found.sum_in_torchs_order.restype = ctypes.c_float
    for name in (
        "quantize_blocks",
        "quantize_scales",
        "dequantize_blocks",
        "compare_pieces",
        "rms_norm",
        "rms_norm_backward",
        "rotary",
        "gated",
        "gated_backward",
        "cross_entropy",
        "arrange_vectors",
        "multiply_rows",
    ):
        getattr(found, name).argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return found


def call(name: str, task: ctypes.Structure) -> Callable[[int, int], bool]:
    """One function of the library, bound to what it works on: takes a range, and tells whether all went well."""
    function = getattr(library(), name)

    def work(start: int, stop: int) -> bool:
        return bool(function(ctypes.byref(task), start, stop))

    return work


def sum_in_torchs_order(address: int, n: int) -> float:
    """The float32 sum of n values, eight at least."""
    found = library()
    assert found is not None
    return float(found.sum_in_torchs_order(address, n))
