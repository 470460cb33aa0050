"""A tensor in 4 bits: packed codes and the scales that bring them back.

Shape legend, all tensors flat and contiguous: N weights in B = ceil(N / 2) bytes, S = ceil(N / block_size) blocks,
G = ceil(S / nested_block_size) groups of blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class QuantizedTensor(NamedTuple):
    """N weights as 4-bit codes with one scale per block; weight = levels[code] * scale, in float32.

    The scale of a block is `absmax` itself, or under double quantization
    `nested_levels[absmax] * nested_absmax + offset`.
    """

    codes: Tensor
    """uint8 [B], two codes a byte, the first weight in the high nibble."""
    absmax: Tensor
    """[S]: uint8 codes of `nested_levels` under double quantization, else float32."""
    levels: Tensor
    """float32 [16]."""
    nested_absmax: Tensor | None
    """float32 [G], None without double quantization."""
    nested_levels: Tensor | None
    """float32 [256], None without double quantization."""
    offset: Tensor | None
    """float32 [], None without double quantization."""
    block_size: int
    """Weights that share one scale."""
    nested_block_size: int
    """Scales that share one nested scale; without double quantization of no effect."""
    shape: tuple[int, ...]
    """The shape of the dense tensor, N elements in row-major order."""

    @property
    def device(self) -> torch.device:
        """Where it is computed with. Codes and absmax may lie in host memory that this device reads, all else there."""
        return self.levels.device
