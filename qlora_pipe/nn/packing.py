"""Where the samples lie in rows that hold several, for the layers that must not mix them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from qlora_pipe.lanes import sent


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packing:
    """Samples one after the other in B rows of T tokens; what is left of a row is padding.

    It is made once for a batch and read by every layer.
    """

    lengths: tuple[tuple[int, ...], ...]
    """Of each row: the lengths of its samples, in tokens, and at the end that of its padding, 0 where there is none."""
    positions: Tensor
    """[B, T], int64: each token's place in its sample. Padding is counted like one more sample."""
    boundaries: Tensor
    """[N + 1], int32: where each of the N samples and paddings begins in the B * T tokens, and last their end."""
    longest: int
    """Tokens of the longest sample or padding."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], *, width: int) -> Self:
        """Describe rows of `width` tokens that hold samples of these lengths, on the CPU."""
        lengths = tuple((*row, width - sum(row)) for row in rows)
        assert all(length > 0 for row in rows for length in row), "a sample has at least one token"
        assert all(row[-1] >= 0 for row in lengths), "the samples of a row must fit in it"
        spans = [length for row in lengths for length in row if length]
        return cls(
            lengths=lengths,
            positions=torch.cat([torch.arange(span) for span in spans]).view(len(lengths), width),
            boundaries=torch.tensor([0, *accumulate(spans)], dtype=torch.int32),
            longest=max(spans),
        )

    def to(self, device: torch.device) -> Self:
        """The same with its tensors on a device, which is not waited for."""
        positions, boundaries = sent(self.positions, device), sent(self.boundaries, device)
        return type(self)(lengths=self.lengths, positions=positions, boundaries=boundaries, longest=self.longest)

    @property
    def spans(self) -> list[int]:
        """Lengths of all samples and paddings that are not empty, in order: those between the boundaries."""
        return [length for row in self.lengths for length in row if length]
