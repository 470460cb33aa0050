"""Dequantize both levels in one launch on a GPU: the kernel and its launcher.

The meaning is `blockwise.dequantize_reference`, which this equals bit for bit. Shape legend: see quantized.py; a tile
holds R whole blocks, each block P = block_size / 2 bytes.
"""

import math
from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.variant import Variant

# Weights per program, unless one block is larger: with four warps, 16 bytes of codes per thread and load.
_TILE: Final = 4096
# No fused multiply-add: the reference rounds the product and the sum each.
OPTIONS: Final = {"num_warps": 4, "enable_fp_fusion": False}


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
    n_bytes: tl.tensor,
    n_blocks: tl.tensor,
    nested_block_size: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    NESTED: tl.constexpr,
    OUT_IS_BFLOAT16: tl.constexpr,
) -> None:
    """One program dequantizes BLOCKS_PER_PROGRAM whole blocks. With OUT_IS_BFLOAT16, out_N is its int16 view."""
    first_block = tl.program_id(0) * BLOCKS_PER_PROGRAM
    row_R = tl.arange(0, BLOCKS_PER_PROGRAM)
    block_R = first_block + row_R
    if NESTED:
        code_R = tl.load(absmax_S + block_R, mask=block_R < n_blocks, other=0).to(tl.int32)
        nested_R = tl.load(nested_absmax_G + block_R // nested_block_size, mask=block_R < n_blocks, other=0.0)
        scale_R = tl.load(nested_levels_256 + code_R) * nested_R + tl.load(offset_1)
    else:
        scale_R = tl.load(absmax_S + block_R, mask=block_R < n_blocks, other=0.0)

    # 64 bits for where the tile starts, 32 within it.
    first_byte = first_block.to(tl.int64) * (BLOCK_SIZE // 2)
    byte_RP = row_R[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    bytes_here = tl.minimum(n_bytes - first_byte, BLOCKS_PER_PROGRAM * (BLOCK_SIZE // 2)).to(tl.int32)
    # Read once and never again: leave the cache to the output, which a matrix product reads next.
    packed_RP = tl.load(
        codes_B + first_byte + byte_RP, mask=byte_RP < bytes_here, other=0, eviction_policy="evict_first"
    ).to(tl.int32)
    high_RP = tl.load(levels_16 + (packed_RP >> 4)) * scale_R[:, None]
    low_RP = tl.load(levels_16 + (packed_RP & 15)) * scale_R[:, None]
    value_RW = tl.interleave(high_RP, low_RP)

    first_weight = first_block.to(tl.int64) * BLOCK_SIZE
    weight_RW = row_R[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside_RW = weight_RW < tl.minimum(n_weights - first_weight, BLOCKS_PER_PROGRAM * BLOCK_SIZE).to(tl.int32)
    if OUT_IS_BFLOAT16:
        # Round to nearest even by hand: the interpreter's own conversion to bfloat16 truncates.
        bits_RW = value_RW.to(tl.uint32, bitcast=True)
        rounded_RW = (bits_RW + 0x7FFF + ((bits_RW >> 16) & 1)) >> 16
        value_RW = rounded_RW.to(tl.uint16).to(tl.int16, bitcast=True)
    tl.store(out_N + first_weight + weight_RW, value_RW.to(out_N.dtype.element_ty), mask=inside_RW)


def blocks_per_program(block_size: int) -> int:
    """How many whole blocks one program dequantizes."""
    return max(1, _TILE // block_size)


def dequantize_triton(q: QuantizedTensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The dense tensor [*q.shape] by one kernel launch; arguments and result as `blockwise.dequantize_reference`."""
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    nested = q.nested_absmax is not None
    is_bfloat16 = dtype == torch.bfloat16
    n_blocks = q.absmax.numel()
    rows = blocks_per_program(q.block_size)
    dequantize_kernel[(math.ceil(n_blocks / rows),)](
        q.codes,
        q.absmax,
        q.levels,
        # Without double quantization the kernel reads none of these three.
        q.nested_absmax if nested else q.absmax,
        q.nested_levels if nested else q.levels,
        q.offset if nested else q.levels,
        out.view(torch.int16) if is_bfloat16 else out,
        math.prod(q.shape),
        q.codes.numel(),
        n_blocks,
        q.nested_block_size,
        BLOCK_SIZE=q.block_size,
        BLOCKS_PER_PROGRAM=rows,
        NESTED=nested,
        OUT_IS_BFLOAT16=is_bfloat16,
        **OPTIONS,
    )
    return out


def variants() -> Iterator[Variant]:
    """The forms that are launched, for ahead_of_time.py."""
    for out in ("fp32", "fp16", "bf16"):
        for nested in (True, False):
            for block_size in (64,) if out != "bf16" else (32, 64, 4096):
                yield _variant(out, nested=nested, block_size=block_size)


def _variant(out: str, *, nested: bool, block_size: int) -> Variant:
    signature = {
        "codes_B": "*u8",
        "absmax_S": "*u8" if nested else "*fp32",
        "levels_16": "*fp32",
        "nested_absmax_G": "*fp32",
        "nested_levels_256": "*fp32",
        "offset_1": "*fp32",
        "out_N": "*i16" if out == "bf16" else f"*{out}",
        "n_weights": "i32",
        "n_bytes": "i32",
        "n_blocks": "i32",
        "nested_block_size": "i32",
    }
    constants = {
        "BLOCK_SIZE": block_size,
        "BLOCKS_PER_PROGRAM": blocks_per_program(block_size),
        "NESTED": nested,
        "OUT_IS_BFLOAT16": out == "bf16",
    }
    name = f"dequantize_{out}_{'double_quant' if nested else 'plain'}_block{block_size}"
    return Variant(
        name, dequantize_kernel, signature, constants, OPTIONS, ("n_weights", "n_bytes", "nested_block_size")
    )
