"""The activations that a T5's config may name, by transformers' names, alone and gating a second projection."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from qlora_kernels.gated import geglu, swiglu

_BY_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
_BY_ERF = ("gelu", "gelu_python")


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(_BY_ERF, functional.gelu),
    **dict.fromkeys(_BY_TANH, lambda x: functional.gelu(x, approximate="tanh")),
    "gelu_10": lambda x: functional.gelu(x).clamp(-10, 10),
    "gelu_fast": _gelu_fast,
    "hardswish": functional.hardswish,
    "laplace": _laplace,
    "leaky_relu": functional.leaky_relu,
    "linear": lambda x: x,
    "mish": functional.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "sqrtsoftplus": lambda x: functional.softplus(x).sqrt(),
    "swish": functional.silu,
    "tanh": torch.tanh,
}


def gated(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """activation(gate) * up, of two projections' outputs that nobody else reads: backward may take their place."""
    if activation in _BY_TANH:
        return geglu(gate, up, approximate="tanh", inplace=True)
    if activation in _BY_ERF:
        return geglu(gate, up, inplace=True)
    if activation in ("silu", "swish"):
        return swiglu(gate, up, inplace=True)
    return ACTIVATIONS[activation](gate) * up
