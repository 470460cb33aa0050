"""Normalisation layers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from qlora_kernels.norm import add_rms_norm, rms_norm, rms_norm_reference
from qlora_pipe.nn.fields import Fields


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of one, then by a weight per component (arXiv 1910.07467).

    [..., D] -> [..., D]. It computes in float32 whatever the input's type, as checkpoints are trained with; the
    weight multiplies after the result is rounded back to that type. With `unit_offset`, as Gemma's checkpoints have it,
    1 + weight multiplies before.
    """

    def __init__(self, size: int, *, eps: float, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if unit_offset else torch.ones(size))
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; a weight that is frozen goes the fast way."""
        norm = rms_norm_reference if self.weight.requires_grad else rms_norm
        return norm(x, self.weight, eps=self.eps, unit_offset=self.unit_offset)

    def after_adding(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Give x + delta, and the norm of that: a residual connection and the norm behind it, in one pass if frozen."""
        if self.weight.requires_grad:
            total = x + delta
            return total, self(total)
        return add_rms_norm(x, delta, self.weight, eps=self.eps, unit_offset=self.unit_offset)


def rms_norm_from(config: Fields) -> Callable[[int], RMSNorm]:
    """Make what makes the norms of a model, all with the eps that its config gives."""
    return partial(RMSNorm, eps=config.number("rms_norm_eps", above=0, at_most=1, default=1e-6))
