"""A frozen linear layer, in 4 bits or dense, with a LoRA adapter beside it, as one autograd function.

Shapes: x [..., in], weight [out, in], lora_a (A) [r, in], lora_b (B) [out, r]; T is the product of x's leading sizes.

    y = x W^T + bias + scale / (1 - dropout) * ((mask * x) A^T) B^T

The method is QLoRA's (arXiv:2305.14314), the adapter LoRA's (arXiv:2106.09685).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.dispatch import dequantize
from qlora_kernels.quantized import QuantizedTensor


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Apply the layer to x [..., in]; returns [..., out] in x's dtype.

    Weight and bias are frozen and get no gradient. Of a forward pass only x, x A^T and `seed` are kept (and a
    reference to the packed weight): the dense weight lives during one product in forward and one in backward.
    Products run in x's dtype, whatever the dtype of A and B, whose gradients come back in their own.

    Dropout acts on the adapter's input alone: with `dropout` > 0, an element is kept where the 31 random bits that
    torch.Generator(x.device).manual_seed(seed) draws for it, read as a fraction, lie below 1 - dropout. They are drawn
    again in backward. The caller leaves it 0 outside of
    training, and gives every layer and step another seed.

    Raises ValueError for one half of an adapter, shapes that do not fit, dropout outside [0, 1) or without a seed, and
    a weight or bias that requires a gradient.
    """
    layer = _Layer(weight, bias, scale, dropout, seed)
    _check(x, layer, lora_a, lora_b)
    return _LoraLinear.apply(x, lora_a, lora_b, layer)  # type: ignore[no-any-return, no-untyped-call]


class _Layer(NamedTuple):
    """All that needs no gradient."""

    weight: Tensor | QuantizedTensor
    bias: Tensor | None
    scale: float
    dropout: float
    seed: int | None

    def dense(self, dtype: torch.dtype) -> Tensor:
        if isinstance(self.weight, QuantizedTensor):
            return dequantize(self.weight, dtype)
        return self.weight.detach().to(dtype)

    @property
    def drops(self) -> bool:
        return self.dropout > 0

    def kept(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Which elements of the adapter's input are kept, bool [T, in]; None for all of them."""
        if self.seed is None or not self.drops:
            return None
        generator = torch.Generator(device).manual_seed(self.seed)
        # Raw bits and a comparison take 0.4 of the time of bernoulli_ on a CPU.
        bits = torch.empty(shape, dtype=torch.int32, device=device).random_(generator=generator)
        return bits < round((1 - self.dropout) * 2**31)

    @property
    def adapter_scale(self) -> float:
        return self.scale / (1 - self.dropout)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, layer: _Layer) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        weight_OI = layer.dense(x.dtype)
        if layer.bias is None:
            y_TO = x_TI @ weight_OI.T
        else:
            y_TO = torch.addmm(layer.bias.detach().to(x.dtype), x_TI, weight_OI.T)
        # Frees the dense weight before the adapter's products allocate theirs.
        del weight_OI
        xa_TR = None
        if lora_a is not None and lora_b is not None:
            xa_TR = _masked(x_TI, layer.kept(x_TI.shape, x.device)) @ lora_a.to(x.dtype).T
            y_TO.addmm_(xa_TR, lora_b.to(x.dtype).T, alpha=layer.adapter_scale)
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, xa_TR if ctx.needs_input_grad[2] else None, lora_a, lora_b
        )
        # Frozen, and so kept by plain reference: hooks on saved tensors (offloading) have no business with it.
        ctx.layer = layer
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, xa_TR, lora_a, lora_b = ctx.saved_tensors
        layer: _Layer = ctx.layer
        x_needs_grad, a_needs_grad, b_needs_grad, _ = ctx.needs_input_grad
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dx_TI = dy_TO @ layer.dense(dy.dtype) if x_needs_grad else None
        da_RI = db_OR = None
        if lora_a is not None:
            dxa_TR = (dy_TO @ lora_b.to(dy.dtype)).mul_(layer.adapter_scale)
            if b_needs_grad:
                db_OR = (dy_TO.T @ xa_TR).to(lora_b.dtype).mul_(layer.adapter_scale)
            kept_TI = layer.kept((dy_TO.shape[0], lora_a.shape[1]), dy.device)
            if a_needs_grad:
                da_RI = (dxa_TR.T @ _masked(x.reshape(-1, x.shape[-1]), kept_TI)).to(lora_a.dtype)
            if dx_TI is not None and kept_TI is not None:
                dx_TI += _masked(dxa_TR @ lora_a.to(dy.dtype), kept_TI)
            elif dx_TI is not None:
                dx_TI.addmm_(dxa_TR, lora_a.to(dy.dtype))
        dx = None if dx_TI is None else dx_TI.view(*dy.shape[:-1], dx_TI.shape[-1])
        return dx, da_RI, db_OR, None


def _masked(x: Tensor, kept: Tensor | None) -> Tensor:
    """x with the dropped elements zeroed; the others unchanged, as `adapter_scale` makes up for them."""
    return x if kept is None else x * kept


def _check(x: Tensor, layer: _Layer, lora_a: Tensor | None, lora_b: Tensor | None) -> None:
    weight, bias = layer.weight, layer.bias
    if (isinstance(weight, Tensor) and weight.requires_grad) or (bias is not None and bias.requires_grad):
        raise ValueError("the base of a LoRA layer is frozen: call requires_grad_(False) on its weight and bias")
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs:
        raise ValueError(f"x of shape {list(x.shape)} does not fit a weight of shape {[outputs, inputs]}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("an adapter is a pair: give both lora_a and lora_b, or neither")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, inputs) or lora_b.shape != (outputs, rank):
            raise ValueError(
                f"an adapter of shapes {list(lora_a.shape)} and {list(lora_b.shape)} does not fit a weight of shape"
                f" {[outputs, inputs]}: [rank, {inputs}] and [{outputs}, rank] do"
            )
    if not 0 <= layer.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {layer.dropout}")
    if layer.drops and layer.seed is None:
        raise ValueError("dropout needs a seed, to draw the same mask in forward and backward")
