"""Products of a few rows with 4-bit weights, as in generation: the packed weights are read once and never made dense.

Shapes: x [..., I], each weight W [O, I], each y [..., O]; M is the product of x's leading sizes.

    y = x W^T

with W as `dequantize` has it. Several weights that share x go in one launch: the projections to queries, keys and
values, or gate and up. From some rows on a dense product is faster; `serves` says from where.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from qlora_kernels import cpu
from qlora_kernels.blockwise import dequantize_reference
from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.quantized_matmul_cpu import MOST_ROWS as MOST_ROWS_ON_A_CPU
from qlora_kernels.quantized_matmul_cpu import quantized_matmul_cpu
from qlora_kernels.way import Way, way_of

MOST_ROWS: Final = 64
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


def serves(x: Tensor, weights: Sequence[QuantizedTensor]) -> bool:
    """Whether `quantized_matmul` takes these and is faster than a dense product; a cheap question.

    Never in plain torch, nor where a gradient is wanted.
    """
    return not _wants_gradient(x) and x.dtype in _DTYPES and _way(x, weights) != "torch"


def quantized_matmul(
    x: Tensor, weights: Sequence[QuantizedTensor], *, outs: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Multiply x [..., I] with the transposes of weights [O, I]: one result [..., O] each, in x's dtype.

    Sums are in float32 and rounded once. On a GPU, products of more than eight rows round each weight to x's dtype
    first, as `dequantize` does. No row's result depends on the number of threads. x is float32, float16 or bfloat16, of
    64 rows at most in all. `outs`, contiguous and of the results' shapes, dtype and device, are written and returned if
    given: then nothing is allocated on a GPU. There is no gradient. Raises ValueError for what does not fit, and for an
    x that wants a gradient.
    """
    shapes = _checked_shapes(x, weights)
    if outs is None:
        outs = [torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes]
    else:
        _check_outs(x, shapes, outs)
    x_MI = x.detach().reshape(-1, x.shape[-1]).contiguous()
    flat = [out.view(-1, q.shape[0]) for out, q in zip(outs, weights, strict=True)]
    way = _way(x_MI, weights)
    if way == "triton":
        # As below.
        from qlora_kernels.quantized_matmul_triton import quantized_matmul_triton  # noqa: PLC0415

        quantized_matmul_triton(x_MI, weights, outs=flat)
    elif way == "c":
        quantized_matmul_cpu(x_MI, weights, outs=flat)
    else:
        quantized_matmul_reference(x_MI, weights, outs=flat)
    return list(outs)


def quantized_matmul_reference(x_MI: Tensor, weights: Sequence[QuantizedTensor], *, outs: Sequence[Tensor]) -> None:
    """Fill outs [M, O], in plain torch: float32 weights, float32 sums, rounded once."""
    for q, out in zip(weights, outs, strict=True):
        out.copy_(x_MI.float() @ dequantize_reference(q, torch.float32).T)


def _way(x: Tensor, weights: Sequence[QuantizedTensor]) -> Way:
    way, rows = way_of(x), x.numel() // max(1, x.shape[-1])
    if way == "triton" and 1 <= rows <= _most_rows_of_triton(x):
        return way
    if way == "c" and 1 <= rows <= MOST_ROWS_ON_A_CPU[x.dtype] and all(cpu.dequantizes(q, x.dtype) for q in weights):
        return way
    return "torch"


def _most_rows_of_triton(x: Tensor) -> int:
    # Imported here because Triton exists on Linux only and takes 0.4 s, which a run on a CPU need not pay.
    from qlora_kernels.quantized_matmul_triton import most_rows  # noqa: PLC0415

    # Triton's interpreter gets products in bfloat16 wrong.
    return 0 if x.dtype == torch.bfloat16 and not x.is_cuda else most_rows(x.device)


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _checked_shapes(x: Tensor, weights: Sequence[QuantizedTensor]) -> list[tuple[int, ...]]:
    if _wants_gradient(x):
        raise ValueError("quantized_matmul has no gradient: call it under torch.no_grad(), or use lora_linear")
    if x.dtype not in _DTYPES:
        raise ValueError(f"cannot multiply a tensor of {x.dtype}: it must be float32, float16 or bfloat16")
    for q in weights:
        if len(q.shape) != 2 or q.shape[1] != x.shape[-1] or q.codes.device != x.device:
            raise ValueError(
                f"x of shape {list(x.shape)} on {x.device} does not fit a weight of shape {list(q.shape)}"
                f" on {q.codes.device}"
            )
    rows = math.prod(x.shape[:-1])
    if rows > MOST_ROWS:
        raise ValueError(f"x has {rows} rows; quantized_matmul takes {MOST_ROWS} at most: use lora_linear")
    return [(*x.shape[:-1], q.shape[0]) for q in weights]


def _check_outs(x: Tensor, shapes: Sequence[tuple[int, ...]], outs: Sequence[Tensor]) -> None:
    found = [(tuple(out.shape), out.dtype, out.device) for out in outs]
    wanted = [(shape, x.dtype, x.device) for shape in shapes]
    if found != wanted or not all(out.is_contiguous() for out in outs):
        raise ValueError(
            f"cannot write the products into tensors of shapes {[list(out.shape) for out in outs]}: outs must be"
            f" contiguous {x.dtype} tensors of shapes {[list(shape) for shape in shapes]} on {x.device}"
        )
