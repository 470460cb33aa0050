"""The values that codes stand for: NF4, FP4 and the 8-bit dynamic map.

NF4 is from "QLoRA" (arXiv:2305.14314), the dynamic map from "8-bit Approximations for Parallelism in Deep Learning"
(arXiv:1511.04561); both, and FP4, are bit for bit those of bitsandbytes.
"""

from functools import cache
from typing import Final, Literal

import torch
from torch import Tensor

Kind = Literal["nf4", "fp4"]

# FP4's eight magnitudes (a sign bit, two exponent bits, one mantissa bit) by code, before division by the largest.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

# The sixteen values of each type by code. NF4: quantiles of the normal distribution, see tests/kernels/test_levels.py
# for the recipe. FP4: codes 8 to 15 are the negatives of 0 to 7, and code 8 is a plain zero.
LEVELS: Final[dict[Kind, tuple[float, ...]]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": tuple(sign * value / 12.0 + 0.0 for sign in (1.0, -1.0) for value in _FP4_MAGNITUDES),
}


def levels_of(kind: Kind, *, device: torch.device | None = None) -> Tensor:
    """The values of a type by code, float32 [16]."""
    return torch.tensor(LEVELS[kind], dtype=torch.float32, device=device)


def recognise(levels: Tensor) -> Kind | None:
    """Name the type whose values are exactly `levels` (float32 [16]), or None."""
    found = levels.detach().cpu()
    for kind in LEVELS:
        if torch.equal(found, levels_of(kind)):
            return kind
    return None


def thresholds(kind: Kind, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The cuts between neighbouring values, and the code of each interval.

    Returns float32 [15], midpoints of the sorted values, and uint8 [16]: a scaled weight that lies above exactly i
    cuts (a tie goes to the lower interval) has code codes[i].
    """
    # A stable sort, so that FP4's two zeros keep the order of their codes.
    ascending = sorted(range(16), key=lambda code: LEVELS[kind][code])
    values = levels_of(kind)[ascending]
    cuts = (values[:-1] + values[1:]) / 2
    return cuts.to(device), torch.tensor(ascending, dtype=torch.uint8, device=device)


def dynamic_map(*, signed: bool = True, device: torch.device | None = None) -> Tensor:
    """The 256 ascending values of the 8-bit dynamic type, float32: from -0.99296875, or unsigned from 0, to 1.

    Decade i of seven, 10**(i - 6) at its top, is cut into 2**i equal parts; their midpoints with both signs, 0 and 1
    are the values. Without signs there are twice as many parts.
    """
    return _dynamic_values(signed=signed).to(device, copy=True)


@cache
def _dynamic_values(*, signed: bool) -> Tensor:
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        # torch.linspace rounds differently from one instruction set to another. Published checkpoints hold what it
        # gives with fused multiply-add, one rounding per edge, which double precision reproduces anywhere.
        low, step = _rounded(0.1), _rounded((1.0 - _rounded(0.1)) / parts)
        from_below = [low + step * i for i in range((parts + 1) // 2)]
        from_above = [1.0 - step * (parts - i) for i in range(len(from_below), parts + 1)]
        edges = torch.tensor(from_below + from_above, dtype=torch.float64).float()
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def _rounded(value: float) -> float:
    """The float32 nearest to a double."""
    return torch.tensor(value, dtype=torch.float64).float().item()
