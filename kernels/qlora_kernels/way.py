"""Which way a tensor goes: the one place that says whether Triton, C or plain torch works on it."""

import os
from typing import Literal

from torch import Tensor

from qlora_kernels import cpu

Way = Literal["triton", "c", "torch"]


def way_of(tensor: Tensor) -> Way:
    """Triton on a GPU, and for all in a process started with TRITON_INTERPRET=1; else C where it was built.

    An operation that has no C code, or none for the type at hand, takes plain torch for "c" too.
    """
    if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return "triton"
    return "c" if cpu.path() != "torch" else "torch"
