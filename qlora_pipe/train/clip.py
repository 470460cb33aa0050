"""How much of a gradient counts: clipping, the loss scale, and whether the step is to be skipped, as one number."""

import math

import torch
from torch import Tensor


def clip_factor(norm: Tensor, *, loss: Tensor, scale: float, limit: float) -> Tensor:
    """What gradients of that norm, made with a loss `scale` times too large, are multiplied by: float32, a scalar.

    The true norm becomes `limit` at most, any if that is 0. The factor is NaN where norm or loss, two scalars on
    one device, is not finite. It is worked out there, in float64, so that nobody waits for it.
    """
    true = norm.double() / scale
    # The small number is torch.nn.utils.clip_grad_norm_'s: curves stay comparable with other trainers'.
    share = (limit / (true + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(true)
    usable = true.isfinite() & loss.isfinite()
    return torch.where(usable, share / scale, math.nan).float()
