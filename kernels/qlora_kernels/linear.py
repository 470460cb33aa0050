"""Frozen linear layers, in 4 bits or dense, with LoRA adapters beside them, as one autograd function.

Layers that share an input are one group: its adapters' A are one product, and its dropout is one mask.

Shapes: x [..., in], weight [out, in], lora_a (A) [r, in], lora_b (B) [out, r]; T is the product of x's leading sizes,
R the sum of the group's ranks.

    y = x W^T + bias + scale / (1 - dropout) * ((mask * x) A^T) B^T

The method is QLoRA's (arXiv:2305.14314), the adapter LoRA's (arXiv:2106.09685).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels.dispatch import dequantize
from qlora_kernels.product_type import product_type
from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.scratch import Scratch


class Layer(NamedTuple):
    """One layer of a group: what is frozen, and the adapter's two matrices or neither."""

    weight: Tensor | QuantizedTensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0


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
    scratch: Scratch | None = None,
) -> Tensor:
    """Apply one layer to x [..., in]; returns [..., out] in x's dtype. As `lora_linears` of that layer alone."""
    layer = Layer(weight, bias, lora_a, lora_b, scale)
    return lora_linears(x, [layer], dropout=dropout, seed=seed, scratch=scratch)[0]


def lora_linears(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    scratch: Scratch | None = None,
) -> tuple[Tensor, ...]:
    """Apply every layer to x [..., in]; returns one [..., out] each, in x's dtype.

    Weights and biases are frozen and get no gradient. Of a forward pass only x, the products x A^T and `seed` are kept
    (and references to the packed weights): a dense weight lives in `scratch` during one product in forward and one in
    backward, or as long as the scratch holds it; without a scratch it is new memory each time. Products run in
    `product_type(x)`, whatever the dtype of A and B, whose gradients come back in their own.

    Dropout acts on the adapters' input alone: with `dropout` > 0, an element is kept where the 31 random bits that
    torch.Generator(x.device).manual_seed(seed) draws for it, read as a fraction, lie below 1 - dropout. They are drawn
    again in backward. The caller leaves it 0 outside of training, and gives every group and step another seed.

    Raises ValueError for one half of an adapter, shapes that do not fit, dropout outside [0, 1) or without a seed, and
    a weight or bias that requires a gradient.
    """
    group = _Group(tuple(layers), dropout, seed, scratch)
    for layer in layers:
        _check(x, layer)
    _check_dropout(group)
    pairs = [part for layer in layers for part in (layer.lora_a, layer.lora_b)]
    return _LoraLinears.apply(x, group, *pairs)  # type: ignore[no-any-return, no-untyped-call]


class _Group(NamedTuple):
    """All that needs no gradient."""

    layers: tuple[Layer, ...]
    dropout: float
    seed: int | None
    scratch: Scratch | None

    def dense(self, layer: Layer, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not isinstance(layer.weight, QuantizedTensor):
            return layer.weight.detach().to(dtype)
        if self.scratch is None:
            return dequantize(layer.weight, dtype)
        return self.scratch.dense(layer.weight, dtype, device)

    @property
    def drops(self) -> bool:
        return self.dropout > 0

    def kept(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Which elements of the adapters' input are kept, bool [T, in]; None for all of them."""
        if self.seed is None or not self.drops:
            return None
        generator = torch.Generator(device).manual_seed(self.seed)
        # Raw bits and a comparison take 0.4 of the time of bernoulli_ on a CPU.
        bits = torch.empty(shape, dtype=torch.int32, device=device).random_(generator=generator)
        return bits < round((1 - self.dropout) * 2**31)

    def scale_of(self, layer: Layer) -> float:
        return layer.scale / (1 - self.dropout)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group, *pairs: Tensor | None) -> tuple[Tensor, ...]:
        dtype = product_type(x)
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        adapted = _adapted(pairs)
        xa_TR = None
        if adapted:
            a_RI = torch.cat([a for a, _ in adapted.values()]).to(dtype)
            xa_TR = _masked(x_TI, group.kept(x_TI.shape, x.device)) @ a_RI.T
        xa_of = _columns(xa_TR, adapted)
        results = []
        for number, layer in enumerate(group.layers):
            weight_OI = group.dense(layer, dtype, x.device)
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            if number not in adapted:
                y_TO = _product(x_TI, weight_OI.T, start=bias)
            else:
                b_RO, scale = adapted[number][1].to(dtype).T, group.scale_of(layer)
                if _rounds(dtype):
                    y_TO = _product(xa_of[number] * scale, b_RO, start=bias).addmm_(x_TI, weight_OI.T)
                else:
                    y_TO = _product(x_TI, weight_OI.T, start=bias).addmm_(xa_of[number], b_RO, alpha=scale)
            # No view to autograd, which forbids a caller to change one in place that came out of here.
            results.append(torch.ops.aten._unsafe_view(y_TO.to(x.dtype), [*x.shape[:-1], y_TO.shape[-1]]))
            # Without a scratch this frees it before the next one is made.
            del weight_OI
        a_needs_grad, b_needs_grad = _wanted(ctx, 0), _wanted(ctx, 1)
        ctx.save_for_backward(x if a_needs_grad else None, xa_TR if b_needs_grad else None, *pairs)
        # Frozen, and so kept by plain reference: hooks on saved tensors (offloading) have no business with it.
        ctx.group = group
        ctx.dtype, ctx.shape = dtype, x.shape
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, xa_TR, *pairs = ctx.saved_tensors
        group: _Group = ctx.group
        dtype = ctx.dtype
        adapted = _adapted(pairs)
        rows = [dy.reshape(-1, dy.shape[-1]).to(dtype) for dy in dys]
        grads: list[Tensor | None] = [None] * len(pairs)

        dxa_TR = a_RI = None
        if adapted:
            xa_of = _columns(xa_TR, adapted)
            a_RI = torch.cat([a for a, _ in adapted.values()]).to(dtype)
            dxa_TR = torch.empty(rows[0].shape[0], a_RI.shape[0], dtype=dtype, device=a_RI.device)
            dxa_of = _columns(dxa_TR, adapted)
            for number, (_, b) in adapted.items():
                scale = group.scale_of(group.layers[number])
                torch.mul(rows[number] @ b.to(dtype), scale, out=dxa_of[number])
                if ctx.needs_input_grad[2 + 2 * number + 1]:
                    grads[2 * number + 1] = (rows[number].T @ xa_of[number]).to(b.dtype).mul_(scale)

        dx_TI = kept_TI = None
        if dxa_TR is not None and a_RI is not None:
            kept_TI = group.kept((dxa_TR.shape[0], a_RI.shape[1]), a_RI.device)
            if _wanted(ctx, 0):
                da_RI = dxa_TR.T @ _masked(x.reshape(-1, x.shape[-1]).to(dtype), kept_TI)
                for number, da in _pieces(da_RI, adapted).items():
                    if ctx.needs_input_grad[2 + 2 * number]:
                        grads[2 * number] = da.to(adapted[number][0].dtype)
            if ctx.needs_input_grad[0] and _rounds(dtype):
                dx_TI = _masked(dxa_TR @ a_RI, kept_TI)
        if ctx.needs_input_grad[0]:
            for layer, dy_TO in zip(group.layers, rows, strict=True):
                weight_OI = group.dense(layer, dtype, dy_TO.device)
                dx_TI = dy_TO @ weight_OI if dx_TI is None else dx_TI.addmm_(dy_TO, weight_OI)
                del weight_OI
        if dx_TI is not None and dxa_TR is not None and a_RI is not None and not _rounds(dtype):
            if kept_TI is None:
                dx_TI.addmm_(dxa_TR, a_RI)
            else:
                dx_TI += _masked(dxa_TR @ a_RI, kept_TI)
        dx = None if dx_TI is None else dx_TI.to(dys[0].dtype).view(ctx.shape)
        return dx, None, *grads


def _adapted(pairs: Sequence[Tensor | None]) -> dict[int, tuple[Tensor, Tensor]]:
    """A and B of the layers that have them, by the layer's number."""
    found = zip(pairs[::2], pairs[1::2], strict=True)
    return {number: (a, b) for number, (a, b) in enumerate(found) if a is not None and b is not None}


def _columns(joint_TR: Tensor | None, adapted: dict[int, tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """Each layer's own columns of a product with the concatenated A."""
    if joint_TR is None:
        return {}
    parts = torch.split(joint_TR, [a.shape[0] for a, _ in adapted.values()], dim=1)
    return dict(zip(adapted, parts, strict=True))


def _pieces(joint_RI: Tensor, adapted: dict[int, tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """Each layer's own rows of the concatenated A's gradient."""
    parts = torch.split(joint_RI, [a.shape[0] for a, _ in adapted.values()])
    return dict(zip(adapted, parts, strict=True))


def _rounds(dtype: torch.dtype) -> bool:
    """Whether a large product must come last in a sum, so that the sum is rounded once.

    Added to a product already rounded to bfloat16, three tenths of a small adapter's bits would be lost. In wider types
    nothing is, and there libraries are more exact where a large product does not begin with another's values.
    """
    return dtype.itemsize == 2


def _product(left: Tensor, right: Tensor, *, start: Tensor | None) -> Tensor:
    return left @ right if start is None else torch.addmm(start, left, right)


def _wanted(ctx: Any, which: int) -> bool:
    """Whether a gradient of any A (0) or any B (1) is wanted."""
    return any(ctx.needs_input_grad[2 + which :: 2])


def _masked(x: Tensor, kept: Tensor | None) -> Tensor:
    """x with the dropped elements zeroed; the others unchanged, as the adapters' scale makes up for them."""
    return x if kept is None else x * kept


def _check(x: Tensor, layer: Layer) -> None:
    weight, bias, lora_a, lora_b, _ = layer
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


def _check_dropout(group: _Group) -> None:
    if not 0 <= group.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {group.dropout}")
    if group.drops and group.seed is None:
        raise ValueError("dropout needs a seed, to draw the same mask in forward and backward")
