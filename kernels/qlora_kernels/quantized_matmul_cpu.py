"""Products of a few rows with packed weights through the C library, where no weight is ever stored dense."""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from qlora_kernels.cpu import DTYPES, dequantization_of
from qlora_kernels.library import Dequantization, Multiplication, call
from qlora_kernels.quantized import QuantizedTensor
from qlora_kernels.threads import in_shares

# Rows of x up to which this beats a dense product, of weights made dense for it; the library takes no more than 16.
# Processors that multiply matrices of bfloat16 do so many times faster than those of float32.
MOST_ROWS: Final = {torch.float32: 16, torch.float16: 16, torch.bfloat16: 8}
# Rows of a weight that the library takes together.
_ROWS_AT_ONCE: Final = 4
# Elements of a row whose order is the library's own.
_CHUNK: Final = 32
# Products that are work for one thread alone: to wake another takes longer.
_SMALLEST_SHARE: Final = 1 << 20


def quantized_matmul_cpu(x_MI: Tensor, weights: Sequence[QuantizedTensor], *, outs: Sequence[Tensor]) -> None:
    """Fill outs [M, O] with x W^T: x contiguous, M at most MOST_ROWS, weights as `cpu.dequantizes` allows."""
    m, length = x_MI.shape
    vectors = torch.empty(m * math.ceil(length / _CHUNK) * _CHUNK, dtype=torch.float32, device="cpu")
    matrices = [dequantization_of(q, x_MI.dtype, out=y.data_ptr()) for q, y in zip(weights, outs, strict=True)]
    task = Multiplication(
        source=x_MI.data_ptr(),
        vectors=vectors.data_ptr(),
        n_vectors=m,
        length=length,
        matrices=(Dequantization * len(matrices))(*matrices),
        n_matrices=len(matrices),
        dtype=DTYPES[x_MI.dtype],
    )
    call("arrange_vectors", task)(0, m)
    smallest = max(1, _SMALLEST_SHARE // (length * m * _ROWS_AT_ONCE)) * _ROWS_AT_ONCE
    in_shares(call("multiply_rows", task), sum(q.shape[0] for q in weights), smallest=smallest)
