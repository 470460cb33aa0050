"""The one place that chooses how a tensor is quantized and made dense again."""

import math

import torch
from torch import Tensor

from qlora_kernels import blockwise, cpu
from qlora_kernels.levels import Kind
from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.way import way_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def quantize(weight: Tensor, *, kind: Kind = "nf4", block_size: int = 64, double_quant: bool = True) -> QuantizedTensor:
    """Quantize a float32, float16 or bfloat16 tensor of any shape to 4 bits, one scale per `block_size` weights.

    A tensor on a GPU, or any tensor in a process started with TRITON_INTERPRET=1, goes through the Triton kernels; one
    on a CPU through the C kernels where they were built, else through plain torch. The bits are the same. Result and
    errors are those of `blockwise.quantize`.
    """
    way = way_of(weight)
    if way == "triton":
        # Imported here because Triton exists on Linux only and takes 0.4 s, which a run on a CPU need not pay.
        from qlora_kernels.quantize_triton import quantize_triton  # noqa: PLC0415

        return quantize_triton(weight, kind=kind, block_size=block_size, double_quant=double_quant)
    if way == "c" and weight.device.type == "cpu":
        return cpu.quantize(weight, kind=kind, block_size=block_size, double_quant=double_quant)
    return blockwise.quantize(weight, kind=kind, block_size=block_size, double_quant=double_quant)


def dequantize(q: QuantizedTensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The dense tensor [*q.shape], computed in float32 and rounded once to `dtype` (float64: only widened).

    A tensor on a GPU (whose codes and absmax may lie in host memory that the driver holds), or any tensor in a process
    started with TRITON_INTERPRET=1, goes through the Triton kernel; one on a CPU through the C kernels where they were
    built, else through plain torch. The bits are the same. `out`, contiguous and of the result's shape, dtype and
    device, is written and returned if given. Raises ValueError if it does not fit, and for other dtypes.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"cannot dequantize to {dtype}: choose float32, float16, bfloat16 or float64")
    if out is not None:
        _check_fits(out, q, dtype)
    way = way_of(q.levels)
    if way == "triton":
        # As above.
        from qlora_kernels.dequantize_triton import dequantize_triton  # noqa: PLC0415

        return dequantize_triton(q, dtype, out=out)
    if way == "c" and cpu.dequantizes(q, dtype):
        return cpu.dequantize(q, dtype, out=out)
    return blockwise.dequantize_reference(q, dtype, out=out)


def squared_error(weight: Tensor, q: QuantizedTensor) -> tuple[float, float]:
    """The sums of (w - w')^2 and of w^2 over all weights w, with w' their dequantized float32 values.

    Summed in float64 in a fixed order: the same bits on every processor and for any number of threads. Raises
    ValueError if the two are not of one size.
    """
    if weight.numel() != math.prod(q.shape):
        raise ValueError(f"cannot compare {weight.numel()} weights with the {math.prod(q.shape)} of a quantized tensor")
    if cpu.path() != "torch" and cpu.compares(weight, q):
        return cpu.squared_error(weight, q)
    return blockwise.squared_error_reference(weight, q)


def _check_fits(out: Tensor, q: QuantizedTensor, dtype: torch.dtype) -> None:
    found = (tuple(out.shape), out.dtype, out.device)
    wanted = (tuple(q.shape), dtype, q.device)
    if found != wanted or not out.is_contiguous():
        layout = "contiguous" if out.is_contiguous() else "not contiguous"
        raise ValueError(
            f"cannot dequantize into a {layout} {found[1]} tensor of shape {list(found[0])} on {found[2]}:"
            f" it must be a contiguous {wanted[1]} tensor of shape {list(wanted[0])} on {wanted[2]}"
        )
