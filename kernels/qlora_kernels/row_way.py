"""Which way the row-wise operations of a training step go."""

import torch
from torch import Tensor

from qlora_kernels.way import Way, way_of


def row_way(*tensors: Tensor) -> Way:
    """That of the first; "torch" where the others are of another dtype or device, or neither Triton nor C serves it.

    Triton serves float32, float16 and bfloat16; not bfloat16 in its interpreter, which cannot round to it. C serves
    float32 and bfloat16.
    """
    first = tensors[0]
    if any(other.dtype != first.dtype or other.device != first.device for other in tensors):
        return "torch"
    way = way_of(first)
    if way == "triton":
        served = {torch.float32, torch.float16} | ({torch.bfloat16} if first.is_cuda else set())
    else:
        served = {torch.float32, torch.bfloat16} if first.device.type == "cpu" else set()
    return way if first.dtype in served else "torch"
