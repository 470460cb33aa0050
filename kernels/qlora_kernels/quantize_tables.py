"""What the kernels of quantize_triton.py look up, on each device once."""

import math
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from qlora_kernels.blockwise import code_of_position
from qlora_kernels.levels import Kind, dynamic_map, levels_of, thresholds

# FP4's cuts are zero and seven magnitudes with both signs. RISE |x| has seven different nearest integers at these, from
# 0 to 15: with the sign they name one of 32 cells of [-1, 1], none of which has two cuts.
FP4_RISE: Final = 15.4


class Tables(NamedTuple):
    """The look-up tables of a kind, on one device."""

    cuts: Tensor
    """NF4: float32 [16], cut k by k, and minus infinity. FP4: float32 [32], the cut of each cell, or infinity."""
    codes_of_sides: Tensor
    """int32 [64]: FP4's code below and above the cut of each cell."""
    levels: Tensor
    """float32 [16]: the value of each code."""
    code_of_position: Tensor
    """uint8 [65536]: the dynamic map's code at each position from -1 to 1."""
    nested_levels: Tensor
    """float32 [256]: the dynamic map."""


@cache
def tables_of(kind: Kind, device: torch.device) -> Tables:
    """Made once, since each copy from the CPU would wait for the GPU; to be read only."""
    cuts, codes_of_sides = _nf4_cuts() if kind == "nf4" else _fp4_cuts()
    return Tables(
        cuts.to(device),
        codes_of_sides.to(device),
        levels_of(kind, device=device),
        code_of_position().to(device),
        dynamic_map(device=device),
    )


def _nf4_cuts() -> tuple[Tensor, Tensor]:
    return torch.cat((torch.tensor([-math.inf]), thresholds("nf4")[0])), torch.zeros(64, dtype=torch.int32)


def _fp4_cuts() -> tuple[Tensor, Tensor]:
    cuts, code_of_interval = thresholds("fp4")
    cut_of_cell = [math.inf] * 32
    for cut in cuts.tolist():
        # Zero is told apart by the sign alone.
        if cut:
            cut_of_cell[round(abs(cut) * FP4_RISE) + 16 * (cut > 0)] = cut
    intervals = []
    for cell, cut in enumerate(cut_of_cell):
        # Where there is no cut, any weight of the cell will do.
        weight = cut if cut < math.inf else (cell % 16 / FP4_RISE) * (1 if cell >= 16 else -1)
        below = int((cuts < weight).sum())
        intervals += [below, below + (cut < math.inf)]
    return torch.tensor(cut_of_cell), code_of_interval[intervals].to(torch.int32)
