"""Which type a matrix product runs in where the tensors' own type would be slow."""

from functools import cache

import torch
from torch import Tensor

# Flags of /proc/cpuinfo, as torch names them, with which a processor multiplies in 16 bits natively.
_NATIVE = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}


def product_type(x: Tensor) -> torch.dtype:
    """x's own dtype; float32 for 16 bits on a CPU that has no products in 16 bits.

    There a product in bfloat16 takes four to seven times as long as in float32, and float32 loses nothing.
    """
    if x.device.type == "cpu" and x.dtype in _NATIVE and not _native(x.dtype):
        return torch.float32
    return x.dtype


@cache
def _native(dtype: torch.dtype) -> bool:
    # What torch would use counts, which may be less than what the processor has.
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    # Older releases of torch cannot say; float32 is never wrong.
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(found.get(flag)) for flag in _NATIVE[dtype])
