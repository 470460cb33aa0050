"""Dequantize both levels in one launch on a GPU: the kernel and its launcher.

The meaning is `blockwise.dequantize_reference`, which this equals bit for bit. Shape legend: see quantized.py; a tile
holds T weights, in R whole blocks of W weights or V words of eight.
"""

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.variant import Variant

# Weights per program: with four warps, 16 bytes of codes per thread. No smaller than the largest block.
_TILE: Final = 4096
# What a vector load needs.
_ALIGNMENT: Final = 16
# The interpreter's own conversion to bfloat16 truncates; a GPU's rounds to nearest even in half an instruction.
_ROUND_WITH_INTEGERS: Final = triton.knobs.runtime.interpret


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_kernel(  # noqa: PLR0917
    codes_B: tl.tensor,
    absmax_S: tl.tensor,
    levels_16: tl.tensor,
    nested_absmax_G: tl.tensor,
    nested_levels_256: tl.tensor,
    offset_1: tl.tensor,
    out_N: tl.tensor,
    n_weights: tl.tensor,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    RAGGED: tl.constexpr,
    ROUND_WITH_INTEGERS: tl.constexpr,
) -> None:
    """One program dequantizes TILE weights. NESTED_BLOCK_SIZE 0 means that the scales are final.

    RAGGED reads byte by byte: for codes at an odd address, and for a last block that is not whole.
    """
    ROWS: tl.constexpr = TILE // BLOCK_SIZE
    first_block = tl.program_id(0) * ROWS
    # 64 bits for where the tile starts, 32 within it.
    first_weight = first_block.to(tl.int64) * BLOCK_SIZE
    weights_here = tl.minimum(n_weights - first_weight, TILE).to(tl.int32)
    row_R = tl.arange(0, ROWS)
    inside_R = row_R * BLOCK_SIZE < weights_here

    # Before the codes, since these go through shared memory, and what is behind that barrier waits for them.
    level_16 = tl.load(levels_16 + tl.arange(0, 16))
    if NESTED_BLOCK_SIZE == 0:
        scale_R = tl.load(absmax_S + first_block + row_R, mask=inside_R, other=0.0)
    else:
        scale_code_R = tl.load(absmax_S + first_block + row_R, mask=inside_R, other=0).to(tl.int32)
        offset = tl.load(offset_1)
        if NESTED_BLOCK_SIZE % ROWS == 0:
            nested_R = tl.load(nested_absmax_G + first_block // NESTED_BLOCK_SIZE)
        else:
            group_R = (first_block + row_R) // NESTED_BLOCK_SIZE
            nested_R = tl.load(nested_absmax_G + group_R, mask=inside_R, other=0.0)
        scale_R = tl.load(nested_levels_256 + scale_code_R) * nested_R + offset

    # The first weight of a byte is its high nibble, the first byte of a word its low end.
    codes_here = codes_B + first_weight // 2
    if RAGGED:
        weight_T = tl.arange(0, TILE)
        packed_T = tl.load(codes_here + weight_T // 2, mask=weight_T < weights_here, other=0).to(tl.int32)
        code_T = packed_T >> ((weight_T & 1) ^ 1) * 4
    else:
        word_V = tl.arange(0, TILE // 8)
        # Read once and never again: leave the cache to the output, which a matrix product reads next.
        packed_V = tl.load(
            codes_here.to(tl.pointer_type(tl.int32)) + word_V,
            mask=word_V < tl.cdiv(weights_here, BLOCK_SIZE) * (BLOCK_SIZE // 8),
            other=0,
            eviction_policy="evict_first",
        )
        code_T = (packed_V[:, None] >> (tl.arange(0, 8) ^ 1)[None, :] * 4).reshape(TILE)
    # From shared memory: a look-up there takes no 64-bit address, and 16 neighbouring words never collide.
    level_T = tl.gather(level_16, code_T & 15, 0)

    value_RW = level_T.reshape(ROWS, BLOCK_SIZE) * scale_R[:, None]
    if ROUND_WITH_INTEGERS and out_N.dtype.element_ty == tl.bfloat16:
        bits_RW = value_RW.to(tl.uint32, bitcast=True)
        rounded_RW = (bits_RW + 0x7FFF + ((bits_RW >> 16) & 1)) >> 16
        value_RW = rounded_RW.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    weight_RW = row_R[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside_RW = weight_RW < weights_here if RAGGED else inside_R[:, None]
    tl.store(out_N + first_weight + weight_RW, value_RW.to(out_N.dtype.element_ty), mask=inside_RW)


def _options(bytes_per_weight: int) -> dict[str, Any]:
    # No fused multiply-add: the reference rounds the product and the sum each.
    return {"num_warps": 4 if bytes_per_weight <= 4 else 8, "enable_fp_fusion": False}


def dequantize_triton(q: QuantizedTensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The dense tensor [*q.shape] by one kernel launch; arguments and result as `blockwise.dequantize_reference`."""
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    n = out.numel()
    nested = q.nested_absmax is not None
    dequantize_kernel[(math.ceil(n / _TILE),)](
        q.codes,
        q.absmax,
        q.levels,
        # Without double quantization the kernel reads none of these three.
        q.nested_absmax if nested else q.levels,
        q.nested_levels if nested else q.levels,
        q.offset if nested else q.levels,
        out,
        n,
        TILE=_TILE,
        BLOCK_SIZE=q.block_size,
        NESTED_BLOCK_SIZE=q.nested_block_size if nested else 0,
        RAGGED=n % q.block_size != 0 or q.codes.data_ptr() % _ALIGNMENT != 0,
        ROUND_WITH_INTEGERS=_ROUND_WITH_INTEGERS,
        **_options(out.itemsize),
    )
    return out


def variants() -> Iterator[Variant]:
    """The forms that are launched, for ahead_of_time.py."""
    for out in ("bf16", "fp16", "fp32", "fp64"):
        for nested_block_size in (256, 0):
            yield _variant(out, nested_block_size=nested_block_size)
    for block_size in (32, 4096):
        yield _variant("bf16", block_size=block_size)
    # Groups smaller than a tile, and what reads bytes.
    yield _variant("bf16", nested_block_size=32)
    yield _variant("bf16", ragged=True)


def _variant(out: str, *, block_size: int = 64, nested_block_size: int = 256, ragged: bool = False) -> Variant:
    return Variant(
        name=f"dequantize_{out}_block{block_size}_nested{nested_block_size}{'_ragged' if ragged else ''}",
        kernel=dequantize_kernel,
        signature={
            "codes_B": "*u8",
            "absmax_S": "*u8" if nested_block_size else "*fp32",
            "levels_16": "*fp32",
            "nested_absmax_G": "*fp32",
            "nested_levels_256": "*fp32",
            "offset_1": "*fp32",
            "out_N": f"*{out}",
            "n_weights": "i32",
        },
        constants={
            "TILE": _TILE,
            "BLOCK_SIZE": block_size,
            "NESTED_BLOCK_SIZE": nested_block_size,
            "RAGGED": ragged,
            "ROUND_WITH_INTEGERS": False,
        },
        options=_options(8 if out == "fp64" else 4),
        aligned=() if ragged else ("n_weights",),
        # With up to 56, nine programs share a multiprocessor and hide the memory's latency.
        registers=56,
    )
