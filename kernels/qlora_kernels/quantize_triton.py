"""Quantize a tensor to 4 bits, and its scales to 8, on a GPU: the kernels and their launcher.

The meaning is `blockwise.quantize`, which this equals bit for bit. Shape legend: see quantized.py; a tile holds T
weights, in R whole blocks of W weights or V words of eight.
"""

import math
from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.blockwise import NESTED_BLOCK_SIZE, NOT_FINITE, check_source, offset_of
from qlora_kernels.levels import Kind
from qlora_kernels.quantize_tables import FP4_RISE, tables_of
from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.variant import Variant

# Weights per program: with four warps, 64 bytes of 16-bit weights per thread. No smaller than the largest block.
_TILE: Final = 4096
# No fused multiply-add: the reference rounds each product and sum.
_OPTIONS: Final = {"num_warps": 4, "enable_fp_fusion": False}
# The bits of blockwise.SMALLEST_SCALE. Magnitudes are compared as integers, above which lie NaN and infinity.
_SMALLEST_SCALE: Final = tl.constexpr(0x006CE3EE)
# Added to a small number, it leaves the nearest integer in the lowest bits.
_ROUNDER: Final = tl.constexpr(12582912.0)
# The curve RISE x - BEND x |x| + SHIFT maps cut k of NF4, k from 1 to 15, to within 0.25 of k, -1 to above -0.5, 1 to
# below 15.5: the nearest integer to a weight's place on it names the only cut to compare the weight with.
_NF4_RISE: Final = tl.constexpr(13.02)
_NF4_BEND: Final = tl.constexpr(5.65)
_NF4_SHIFT: Final = tl.constexpr(7.7346)
_FP4_RISE: Final = tl.constexpr(FP4_RISE)


@triton.jit  # type: ignore[untyped-decorator]
def _nf4_codes(scaled_T: tl.tensor, cuts_16: tl.tensor) -> tl.tensor:
    slope_T = tl.fma(tl.abs(scaled_T), -_NF4_BEND, _NF4_RISE)
    place_T = tl.fma(scaled_T, slope_T, _NF4_SHIFT) + _ROUNDER
    nearest_T = place_T.to(tl.int32, bitcast=True) & 15
    # The sign of a difference is exact, and cheaper than a comparison.
    below_cut_T = tl.gather(cuts_16, nearest_T, 0) - scaled_T
    return nearest_T - 1 + (below_cut_T.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _fp4_codes(scaled_T: tl.tensor, cuts_32: tl.tensor, codes_64: tl.tensor) -> tl.tensor:
    place_T = tl.fma(tl.abs(scaled_T), _FP4_RISE, _ROUNDER)
    cell_T = (place_T.to(tl.int32, bitcast=True) & 15) + tl.where(scaled_T > 0, 16, 0)
    is_above_T = (scaled_T > tl.gather(cuts_32, cell_T, 0)).to(tl.int32)
    return tl.gather(codes_64, cell_T * 2 + is_above_T, 0)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # noqa: PLR0917
    weight_N: tl.tensor,
    cuts_C: tl.tensor,
    codes_of_sides_64: tl.tensor,
    codes_B: tl.tensor,
    absmax_S: tl.tensor,
    n_weights: tl.tensor,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_NF4: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """One program quantizes TILE weights in whole blocks; with REST, those of the last block if it is not whole."""
    ROWS: tl.constexpr = TILE // BLOCK_SIZE
    # First, so that nothing waits for it later.
    if IS_NF4:
        cuts = tl.load(cuts_C + tl.arange(0, 16))
    else:
        cuts = tl.load(cuts_C + tl.arange(0, 32))
        codes_of_sides = tl.load(codes_of_sides_64 + tl.arange(0, 64))
    whole_blocks = n_weights // BLOCK_SIZE
    rest = n_weights % BLOCK_SIZE
    row_R = tl.arange(0, ROWS)
    weight_RW = row_R[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    if REST:
        first_block = whole_blocks
        inside_R = row_R == 0
        inside_RW = weight_RW < rest
    else:
        first_block = tl.program_id(0) * ROWS
        inside_R = first_block + row_R < whole_blocks
        inside_RW = inside_R[:, None]
    # 64 bits for where the tile starts, 32 within it.
    first_weight = first_block.to(tl.int64) * BLOCK_SIZE
    weight_here = weight_N + first_weight + weight_RW
    value_RW = tl.load(weight_here, mask=inside_RW, other=0.0, eviction_policy="evict_first").to(tl.float32)

    absmax_R = tl.max(value_RW.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    divisor_R = tl.maximum(absmax_R, _SMALLEST_SCALE)
    if REST:
        absmax_R = divisor_R
        scaled_RW = tl.math.div_rn(value_RW, divisor_R.to(tl.float32, bitcast=True)[:, None])
    else:
        scaled_RW = value_RW * tl.math.div_rn(1.0, divisor_R.to(tl.float32, bitcast=True))[:, None]
    tl.store(absmax_S + first_block + row_R, absmax_R.to(tl.float32, bitcast=True), mask=inside_R)

    scaled_T = scaled_RW.reshape(TILE)
    code_T = _nf4_codes(scaled_T, cuts) if IS_NF4 else _fp4_codes(scaled_T, cuts, codes_of_sides)
    # The first weight of a byte is its high nibble, the first byte of a word its low end. Weights that are not there
    # have the code of zero.
    packed_V = tl.sum(code_T.reshape(TILE // 8, 8) << (tl.arange(0, 8) ^ 1)[None, :] * 4, axis=1)
    codes_here = codes_B + first_weight // 2
    word_V = tl.arange(0, TILE // 8)
    if REST:
        byte_V4 = word_V[:, None] * 4 + tl.arange(0, 4)[None, :]
        packed_V4 = (packed_V[:, None] >> tl.arange(0, 4)[None, :] * 8).to(tl.uint8)
        tl.store(codes_here + byte_V4, packed_V4, mask=byte_V4 < (rest + 1) // 2)
    else:
        words_here = (whole_blocks - first_block) * (BLOCK_SIZE // 8)
        tl.store(codes_here.to(tl.pointer_type(tl.int32)) + word_V, packed_V, mask=word_V < words_here)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_scales_kernel(  # noqa: PLR0917
    scale_S: tl.tensor,
    offset_1: tl.tensor,
    code_of_position_65536: tl.tensor,
    codes_S: tl.tensor,
    absmax_G: tl.tensor,
    n_scales: tl.tensor,
    GROUP_SIZE: tl.constexpr,
) -> None:
    """One program quantizes one group of scales to 8 bits, by the position rule of blockwise.py."""
    group = tl.program_id(0)
    index = group * GROUP_SIZE + tl.arange(0, GROUP_SIZE)
    inside = index < n_scales
    value = tl.where(inside, tl.load(scale_S + index, mask=inside, other=0.0) - tl.load(offset_1), 0.0)
    absmax = tl.max(tl.abs(value), axis=0)
    tl.store(absmax_G + group, absmax)
    scaled = value * tl.math.div_rn(1.0, absmax)
    # Zero times infinity has no position and goes to the lower end, too.
    scaled = tl.where(scaled > -1.0, scaled, -1.0)
    scaled = tl.where(scaled < 1.0, scaled, 1.0)
    position = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).to(tl.int32)
    tl.store(codes_S + index, tl.load(code_of_position_65536 + position), mask=inside)


def quantize_triton(
    weight: Tensor, *, kind: Kind = "nf4", block_size: int = 64, double_quant: bool = True
) -> QuantizedTensor:
    """Quantize on a GPU; arguments, result and errors as `blockwise.quantize`.

    Waits for the GPU once, to see whether all weights were finite, and under double quantization takes the scales to
    the CPU, where alone torch's order of summation for `offset` is to be had.
    """
    check_source(weight, block_size)
    device = weight.device
    codes_B, absmax_S = quantize_blocks(weight, kind=kind, block_size=block_size)
    if not absmax_S.isfinite().all():
        raise ValueError(NOT_FINITE)
    tables, shape = tables_of(kind, device), tuple(weight.shape)
    levels = tables.levels.clone()
    if not double_quant:
        return QuantizedTensor(codes_B, absmax_S, levels, None, None, None, block_size, NESTED_BLOCK_SIZE, shape)
    offset = offset_of(absmax_S)
    nested_codes_S = torch.empty(absmax_S.numel(), dtype=torch.uint8, device=device)
    nested_absmax_G = torch.empty(math.ceil(absmax_S.numel() / NESTED_BLOCK_SIZE), dtype=torch.float32, device=device)
    quantize_scales_kernel[(nested_absmax_G.numel(),)](
        absmax_S,
        offset,
        tables.code_of_position,
        nested_codes_S,
        nested_absmax_G,
        absmax_S.numel(),
        GROUP_SIZE=NESTED_BLOCK_SIZE,
        **_OPTIONS,
    )
    return QuantizedTensor(
        codes_B,
        nested_codes_S,
        levels,
        nested_absmax_G,
        tables.nested_levels.clone(),
        offset,
        block_size,
        NESTED_BLOCK_SIZE,
        shape,
    )


def quantize_blocks(weight: Tensor, *, kind: Kind, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [B], and block maxima, float32 [S], by one launch, or a second for a last block that is not whole.

    Nothing waits for the GPU. Where a block holds NaN or infinity its maximum is one of these, and its codes nonsense.
    """
    flat_N = weight.detach().contiguous().view(-1)
    n, device = flat_N.numel(), weight.device
    tables = tables_of(kind, device)
    codes_B = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax_S = torch.empty(math.ceil(n / block_size), dtype=torch.float32, device=device)
    tiles_of_whole_blocks = math.ceil(n // block_size * block_size / _TILE)
    for programs, tile, rest in ((tiles_of_whole_blocks, _TILE, False), (int(n % block_size != 0), block_size, True)):
        if programs:
            quantize_kernel[(programs,)](
                flat_N,
                tables.cuts,
                tables.codes_of_sides,
                codes_B,
                absmax_S,
                n,
                TILE=tile,
                BLOCK_SIZE=block_size,
                IS_NF4=kind == "nf4",
                REST=rest,
                **_OPTIONS,
            )
    return codes_B, absmax_S


def variants() -> Iterator[Variant]:
    """The forms that are launched, for ahead_of_time.py."""
    for weight in ("bf16", "fp16", "fp32"):
        yield _variant(weight)
    yield _variant("bf16", block_size=32)
    yield _variant("bf16", block_size=4096)
    yield _variant("bf16", kind="fp4")
    yield _variant("bf16", rest=True)
    yield _variant("bf16", kind="fp4", block_size=4096, rest=True)
    yield Variant(
        name="quantize_scales",
        kernel=quantize_scales_kernel,
        signature={
            "scale_S": "*fp32",
            "offset_1": "*fp32",
            "code_of_position_65536": "*u8",
            "codes_S": "*u8",
            "absmax_G": "*fp32",
            "n_scales": "i32",
        },
        constants={"GROUP_SIZE": NESTED_BLOCK_SIZE},
        options=_OPTIONS,
        registers=48,
    )


def _variant(weight: str, *, kind: Kind = "nf4", block_size: int = 64, rest: bool = False) -> Variant:
    return Variant(
        name=f"quantize_{kind}_{weight}_block{block_size}{'_rest' if rest else ''}",
        kernel=quantize_kernel,
        signature={
            "weight_N": f"*{weight}",
            "cuts_C": "*fp32",
            "codes_of_sides_64": "*i32",
            "codes_B": "*u8",
            "absmax_S": "*fp32",
            "n_weights": "i32",
        },
        constants={
            "TILE": block_size if rest else _TILE,
            "BLOCK_SIZE": block_size,
            "IS_NF4": kind == "nf4",
            "REST": rest,
        },
        options=_OPTIONS,
        aligned=() if rest else ("n_weights",),
        # With up to 80, six programs share a multiprocessor, each with 8 KiB of 16-bit weights on their way.
        registers=80,
    )
