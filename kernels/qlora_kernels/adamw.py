"""One AdamW step over a page: flat slices of parameters, of their gradients, and of both moments.

Decoupled weight decay is from "Decoupled Weight Decay Regularization" (arXiv:1711.05101), moments in 8 bits, one scale
per block of 256, from "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861).

Shapes, all flat and contiguous: parameter_N, gradient_N and moments in 32 bits float32; moments in 8 bits codes_N uint8
with absmax_S float32, S = ceil(N / 256). factor_1 is float32 and holds one number.
"""

import math
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from qlora_kernels.levels import dynamic_map
from qlora_kernels.way import way_of

BLOCK: Final = 256
# The first moment's code of zero; the second's is 0.
SIGNED_ZERO: Final = 127


class Coefficients(NamedTuple):
    """What the numbers of one step are multiplied by, worked out on the host in double precision."""

    decay: float
    """1 - lr * weight_decay"""
    weight1: float
    """1 - beta1"""
    beta2: float
    weight2: float
    """1 - beta2"""
    root: float
    """The square root of the second moment's bias correction."""
    eps: float
    step_size: float
    """lr over the first moment's bias correction."""


class Moments32(NamedTuple):
    """Both moments as they are."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class Moments8(NamedTuple):
    """Both moments in 8 bits: codes of the signed and of the unsigned dynamic map, and the largest number per block."""

    exp_avg_codes: Tensor
    exp_avg_sq_codes: Tensor
    exp_avg_absmax: Tensor
    exp_avg_sq_absmax: Tensor


class DynamicMap(NamedTuple):
    """256 ascending levels, and what finds the code of a number: that of the nearest, of two equally near the lower.

    A second moment above zero has no code of zero: the next step would divide by what is left of it.
    """

    levels: Tensor
    cuts: Tensor
    """The midpoints (the second moment's first is 0), and infinity: a number above exactly i of them has code i."""
    cells: Tensor
    """By a float32's upper 16 bits, how many cuts lie below every such number; no cell has more than one cut in it."""


def coefficients(
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, number: int
) -> Coefficients:
    """The coefficients of update `number`, counted from 1, in torch.optim.AdamW's order of operations."""
    beta1, beta2 = betas
    return Coefficients(
        decay=1 - lr * weight_decay,
        weight1=1 - beta1,
        beta2=beta2,
        weight2=1 - beta2,
        root=(1 - beta2**number) ** 0.5,
        eps=eps,
        step_size=lr / (1 - beta1**number),
    )


@cache
def moment_map(*, signed: bool, device: torch.device) -> DynamicMap:
    """The map of the first moment (signed) or of the second (not), on a device; shared, and not to be written to."""
    levels = dynamic_map(signed=signed)
    cuts = torch.cat([(levels[:-1] + levels[1:]) / 2, torch.tensor([math.inf])])
    if not signed:
        cuts[0] = 0
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    # The least number of a cell: among negative ones that with the largest magnitude.
    least = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    cells = torch.bucketize(least.nan_to_num(), cuts, out_int32=True)
    return DynamicMap(levels.to(device), cuts.to(device), cells.to(device))


@torch.no_grad()
def adamw_reference(
    parameter_N: Tensor, gradient_N: Tensor, moments: Moments32, *, factor_1: Tensor, by: Coefficients
) -> None:
    """torch.optim.AdamW(foreach=False, fused=False) with the gradient times `factor_1`, in place, in the same bits.

    Its operations work on each number by itself, and their bits do not depend on where a slice starts or ends.
    """
    if bool(factor_1.isnan()):
        return
    piece = _piece()
    scratch = gradient_N.new_empty(2, min(piece, gradient_N.numel()))
    for parameter, gradient, exp_avg, exp_avg_sq in zip(
        *(torch.split(whole, piece) for whole in (parameter_N, gradient_N, *moments)), strict=True
    ):
        scaled, denominator = scratch[:, : gradient.numel()]
        torch.mul(gradient, factor_1, out=scaled)
        if by.decay != 1:
            parameter.mul_(by.decay)
        exp_avg.lerp_(scaled, by.weight1)
        exp_avg_sq.mul_(by.beta2).addcmul_(scaled, scaled, value=by.weight2)
        torch.sqrt(exp_avg_sq, out=denominator).div_(by.root).add_(by.eps)
        parameter.addcdiv_(exp_avg, denominator, value=-by.step_size)


@torch.no_grad()
def adamw_8bit_reference(
    parameter_N: Tensor, gradient_N: Tensor, moments: Moments8, *, factor_1: Tensor, by: Coefficients
) -> None:
    """AdamW with moments in 8 bits, in place: they are widened, moved on in float32, used, and rounded to codes again.

    Every product and sum is rounded by itself, so the bits are the same on every device.
    """
    if bool(factor_1.isnan()):
        return
    piece = _piece()
    signed, unsigned = (moment_map(signed=signed, device=parameter_N.device) for signed in (True, False))
    for parameter, gradient, codes1, codes2, absmax1, absmax2 in zip(
        *(torch.split(whole, piece) for whole in (parameter_N, gradient_N, *moments[:2])),
        *(torch.split(whole, piece // BLOCK) for whole in moments[2:]),
        strict=True,
    ):
        scaled = gradient * factor_1
        exp_avg = _widened(codes1, absmax1, signed).mul_(1 - by.weight1).add_(scaled * by.weight1)
        exp_avg_sq = _widened(codes2, absmax2, unsigned).mul_(by.beta2).add_((scaled * scaled).mul_(by.weight2))
        # torch's float32 root on a CPU is not always the nearest number; by way of float64 it is.
        denominator = exp_avg_sq.double().sqrt_().float().div_(by.root).add_(by.eps)
        if by.decay != 1:
            parameter.mul_(by.decay)
        parameter.sub_((exp_avg / denominator).mul_(by.step_size))
        _narrow(exp_avg, codes1, absmax1, signed)
        _narrow(exp_avg_sq, codes2, absmax2, unsigned)


def _piece() -> int:
    """How many numbers are worked on at a time: one thread's stay in its cache; several threads seldom have to meet."""
    return 2**16 if torch.get_num_threads() == 1 else 2**21


def _widened(codes_N: Tensor, absmax_S: Tensor, values: DynamicMap) -> Tensor:
    return values.levels.index_select(0, codes_N.int()) * absmax_S.repeat_interleave(BLOCK)[: codes_N.numel()]


def _narrow(moment_N: Tensor, codes_N: Tensor, absmax_S: Tensor, values: DynamicMap) -> None:
    short = absmax_S.numel() * BLOCK - moment_N.numel()
    blocks_SB = torch.nn.functional.pad(moment_N, (0, short)).view(-1, BLOCK)
    torch.amax(blocks_SB.abs(), dim=1, out=absmax_S)
    # A block of zeros must not divide by zero.
    shares_SB = blocks_SB / torch.where(absmax_S > 0, absmax_S, 1.0)[:, None]
    codes_N.copy_(codes_of(shares_SB.view(-1)[: moment_N.numel()], values))


def codes_of(shares_N: Tensor, values: DynamicMap) -> Tensor:
    """The codes of float32 numbers from -1 to 1, int32 [N]."""
    below = values.cells.index_select(0, (shares_N.view(torch.int32) >> 16) & 0xFFFF)
    return below + (shares_N > values.cuts.index_select(0, below))


def adamw_step(
    parameter_N: Tensor, gradient_N: Tensor, moments: Moments32 | Moments8, *, factor_1: Tensor, by: Coefficients
) -> None:
    """One AdamW step over a page, in place; the gradient counts times `factor_1`, and is itself left as it is.

    Where the factor is NaN nothing is touched: so whoever makes it can skip a step without a look at it from the host.
    Moments in 32 bits: on a CPU the bits are torch.optim.AdamW(foreach=False, fused=False)'s however pages are cut, on
    a GPU they are within 2 units in the last place of it. In 8 bits: blocks are cut from the page's start, and the bits
    are the same everywhere. Raises ValueError for other dtypes or sizes than the module's docstring gives.
    """
    _check(parameter_N, gradient_N, moments, factor_1)
    if way_of(parameter_N) == "triton":
        # Imported here because Triton exists on Linux only and takes 0.4 s, which a run on a CPU need not pay.
        from qlora_kernels.adamw_triton import adamw_8bit_triton, adamw_triton  # noqa: PLC0415

        if isinstance(moments, Moments8):
            return adamw_8bit_triton(parameter_N, gradient_N, moments, factor_1=factor_1, by=by)
        return adamw_triton(parameter_N, gradient_N, moments, factor_1=factor_1, by=by)
    if isinstance(moments, Moments8):
        return adamw_8bit_reference(parameter_N, gradient_N, moments, factor_1=factor_1, by=by)
    return adamw_reference(parameter_N, gradient_N, moments, factor_1=factor_1, by=by)


def _check(parameter_N: Tensor, gradient_N: Tensor, moments: Moments32 | Moments8, factor_1: Tensor) -> None:
    size = parameter_N.numel()
    flat, blocks = (torch.float32, (size,)), (torch.float32, (-(-size // BLOCK),))
    codes = (torch.uint8, (size,))
    wanted = (flat, flat, *((codes, codes, blocks, blocks) if isinstance(moments, Moments8) else (flat, flat)))
    tensors = (parameter_N, gradient_N, *moments)
    found = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
    if found != wanted or not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(
            f"a page's parameters, gradients and moments are {_listed(wanted)}, all contiguous;"
            f" given were {_listed(found)}"
        )
    if factor_1.dtype != torch.float32 or factor_1.numel() != 1:
        raise ValueError(
            f"the factor is one float32 number; given was {factor_1.dtype} of shape {list(factor_1.shape)}"
        )


def _listed(kinds: tuple[tuple[torch.dtype, tuple[int, ...]], ...]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {list(shape)}" for dtype, shape in kinds)
