"""Normalisation layers."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of one, then by a weight per component (arXiv 1910.07467).

    [..., D] -> [..., D]. It computes in float32 whatever the input's type, as checkpoints are trained with; the
    weight multiplies after the result is rounded back to that type.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
