"""One AdamW step over a page on a GPU: the kernels and their launchers, each one launch.

The meaning, and the shapes, are those of adamw.py's references. A tile of the 8-bit kernel holds R blocks of W numbers.
"""

import math
from collections.abc import Iterator
from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.adamw import BLOCK, Coefficients, Moments8, Moments32, moment_map
from qlora_kernels.variant import Variant

_TILE: Final = 1024
# Less work per thread than above: the search for codes takes registers.
_TILE_8BIT: Final = 2 * BLOCK
# Where numbers are multiplied and added in one rounding is said in the kernels, as the last bits follow from it.
OPTIONS: Final = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def adamw_kernel(  # noqa: PLR0917
    parameter_N: tl.tensor,
    gradient_N: tl.tensor,
    exp_avg_N: tl.tensor,
    exp_avg_sq_N: tl.tensor,
    factor_1: tl.tensor,
    n_numbers: tl.tensor,
    decay: tl.tensor,
    weight1: tl.tensor,
    beta2: tl.tensor,
    weight2: tl.tensor,
    root: tl.tensor,
    eps: tl.tensor,
    step_size: tl.tensor,
    FROM_START: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program moves TILE numbers. FROM_START says that weight1 is below a half, as torch's lerp asks."""
    factor = tl.load(factor_1)
    # NaN does not equal itself: with that factor nothing is read or written.
    n_moving = tl.where(factor == factor, n_numbers, 0)  # noqa: PLR0124
    at_T = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside_T = at_T < n_moving
    parameter_T = tl.load(parameter_N + at_T, mask=inside_T, other=0.0) * decay
    gradient_T = tl.load(gradient_N + at_T, mask=inside_T, other=0.0, eviction_policy="evict_first") * factor
    exp_avg_T = tl.load(exp_avg_N + at_T, mask=inside_T, other=0.0)
    exp_avg_sq_T = tl.load(exp_avg_sq_N + at_T, mask=inside_T, other=0.0)

    # Fused and rounded where torch's CUDA kernels are, which also multiply by the inverse of a number from the host.
    if FROM_START:
        exp_avg_T = tl.fma(gradient_T - exp_avg_T, weight1, exp_avg_T)
    else:
        exp_avg_T = tl.fma(exp_avg_T - gradient_T, 1.0 - weight1, gradient_T)
    exp_avg_sq_T = tl.fma(gradient_T * gradient_T, weight2, exp_avg_sq_T * beta2)
    denominator_T = tl.sqrt_rn(exp_avg_sq_T) * tl.div_rn(1.0, root) + eps
    parameter_T = tl.fma(tl.div_rn(exp_avg_T, denominator_T), -step_size, parameter_T)

    tl.store(exp_avg_N + at_T, exp_avg_T, mask=inside_T)
    tl.store(exp_avg_sq_N + at_T, exp_avg_sq_T, mask=inside_T)
    tl.store(parameter_N + at_T, parameter_T, mask=inside_T)


@triton.jit  # type: ignore[untyped-decorator]
def _code_of(shares_RW: tl.tensor, cuts_256: tl.tensor) -> tl.tensor:
    """How many cuts each number lies above, found by halving."""
    code_RW = tl.zeros_like(shares_RW).to(tl.int32)
    for halving in tl.static_range(8):
        above_RW = shares_RW > tl.load(cuts_256 + code_RW + ((128 >> halving) - 1))
        code_RW = tl.where(above_RW, code_RW + (128 >> halving), code_RW)
    return code_RW


@triton.jit  # type: ignore[untyped-decorator]
def adamw_8bit_kernel(  # noqa: PLR0917
    parameter_N: tl.tensor,
    gradient_N: tl.tensor,
    exp_avg_codes_N: tl.tensor,
    exp_avg_sq_codes_N: tl.tensor,
    exp_avg_absmax_S: tl.tensor,
    exp_avg_sq_absmax_S: tl.tensor,
    signed_levels_256: tl.tensor,
    signed_cuts_256: tl.tensor,
    unsigned_levels_256: tl.tensor,
    unsigned_cuts_256: tl.tensor,
    factor_1: tl.tensor,
    n_numbers: tl.tensor,
    decay: tl.tensor,
    beta1: tl.tensor,
    weight1: tl.tensor,
    beta2: tl.tensor,
    weight2: tl.tensor,
    root: tl.tensor,
    eps: tl.tensor,
    step_size: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
) -> None:
    """One program moves BLOCKS_PER_PROGRAM blocks."""
    factor = tl.load(factor_1)
    # As in adamw_kernel.
    n_moving = tl.where(factor == factor, n_numbers, 0)  # noqa: PLR0124
    block_R = tl.program_id(0).to(tl.int64) * BLOCKS_PER_PROGRAM + tl.arange(0, BLOCKS_PER_PROGRAM)
    at_RW = block_R[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside_RW = at_RW < n_moving
    inside_R = block_R * BLOCK_SIZE < n_moving
    parameter_RW = tl.load(parameter_N + at_RW, mask=inside_RW, other=0.0) * decay
    gradient_RW = tl.load(gradient_N + at_RW, mask=inside_RW, other=0.0, eviction_policy="evict_first") * factor
    code1_RW = tl.load(exp_avg_codes_N + at_RW, mask=inside_RW, other=0).to(tl.int32)
    code2_RW = tl.load(exp_avg_sq_codes_N + at_RW, mask=inside_RW, other=0).to(tl.int32)
    absmax1_R = tl.load(exp_avg_absmax_S + block_R, mask=inside_R, other=0.0)
    absmax2_R = tl.load(exp_avg_sq_absmax_S + block_R, mask=inside_R, other=0.0)

    exp_avg_RW = tl.load(signed_levels_256 + code1_RW) * absmax1_R[:, None] * beta1 + gradient_RW * weight1
    square_RW = gradient_RW * gradient_RW * weight2
    exp_avg_sq_RW = tl.load(unsigned_levels_256 + code2_RW) * absmax2_R[:, None] * beta2 + square_RW
    denominator_RW = tl.div_rn(tl.sqrt_rn(exp_avg_sq_RW), root) + eps
    parameter_RW = parameter_RW - tl.div_rn(exp_avg_RW, denominator_RW) * step_size

    # What lies outside is no part of a last block: it counts as zero.
    exp_avg_RW = tl.where(inside_RW, exp_avg_RW, 0.0)
    exp_avg_sq_RW = tl.where(inside_RW, exp_avg_sq_RW, 0.0)
    absmax1_R = tl.max(tl.abs(exp_avg_RW), axis=1)
    absmax2_R = tl.max(exp_avg_sq_RW, axis=1)
    # A block of zeros must not divide by zero.
    divisor1_R = tl.where(absmax1_R > 0.0, absmax1_R, 1.0)
    divisor2_R = tl.where(absmax2_R > 0.0, absmax2_R, 1.0)
    code1_RW = _code_of(tl.div_rn(exp_avg_RW, divisor1_R[:, None]), signed_cuts_256)
    code2_RW = _code_of(tl.div_rn(exp_avg_sq_RW, divisor2_R[:, None]), unsigned_cuts_256)

    tl.store(exp_avg_codes_N + at_RW, code1_RW.to(tl.uint8), mask=inside_RW)
    tl.store(exp_avg_sq_codes_N + at_RW, code2_RW.to(tl.uint8), mask=inside_RW)
    tl.store(exp_avg_absmax_S + block_R, absmax1_R, mask=inside_R)
    tl.store(exp_avg_sq_absmax_S + block_R, absmax2_R, mask=inside_R)
    tl.store(parameter_N + at_RW, parameter_RW, mask=inside_RW)


def adamw_triton(
    parameter_N: Tensor, gradient_N: Tensor, moments: Moments32, *, factor_1: Tensor, by: Coefficients
) -> None:
    """`adamw_reference` by one launch, within 2 units in the last place of torch's own CUDA kernels."""
    adamw_kernel[(math.ceil(parameter_N.numel() / _TILE),)](
        parameter_N,
        gradient_N,
        *moments,
        factor_1,
        parameter_N.numel(),
        by.decay,
        by.weight1,
        by.beta2,
        by.weight2,
        by.root,
        by.eps,
        by.step_size,
        FROM_START=by.weight1 < 0.5,
        TILE=_TILE,
        **OPTIONS,
    )


def adamw_8bit_triton(
    parameter_N: Tensor, gradient_N: Tensor, moments: Moments8, *, factor_1: Tensor, by: Coefficients
) -> None:
    """`adamw_8bit_reference` by one launch, with its bits."""
    signed, unsigned = (moment_map(signed=signed, device=parameter_N.device) for signed in (True, False))
    adamw_8bit_kernel[(math.ceil(parameter_N.numel() / _TILE_8BIT),)](
        parameter_N,
        gradient_N,
        *moments,
        signed.levels,
        signed.cuts,
        unsigned.levels,
        unsigned.cuts,
        factor_1,
        parameter_N.numel(),
        by.decay,
        1 - by.weight1,
        by.weight1,
        by.beta2,
        by.weight2,
        by.root,
        by.eps,
        by.step_size,
        BLOCK_SIZE=BLOCK,
        BLOCKS_PER_PROGRAM=_TILE_8BIT // BLOCK,
        **OPTIONS,
    )


def variants() -> Iterator[Variant]:
    """The forms that are launched, for ahead_of_time.py."""
    for from_start in (True, False):
        name = f"adamw_32bit{'' if from_start else '_beta1_below_half'}"
        yield _variant(name, adamw_kernel, {"FROM_START": from_start, "TILE": _TILE})
    yield _variant("adamw_8bit", adamw_8bit_kernel, {"BLOCK_SIZE": BLOCK, "BLOCKS_PER_PROGRAM": _TILE_8BIT // BLOCK})


def _variant(name: str, kernel: Any, constants: dict[str, Any]) -> Variant:
    def kind(argument: str) -> str:
        if argument == "n_numbers":
            return "i32"
        if argument.rpartition("_")[2] in {"N", "S", "1", "256"}:
            return "*u8" if "codes" in argument else "*fp32"
        return "fp32"

    signature = {argument: kind(argument) for argument in kernel.arg_names if argument not in constants}
    return Variant(name, kernel, signature, constants, OPTIONS, ("n_numbers",))
