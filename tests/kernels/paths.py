"""The ways through the C kernels that this processor has, and tensors in awkward places of memory."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from qlora_kernels import QuantizedTensor, cpu

SOURCES = Path(__file__).resolve().parents[2] / "kernels/qlora_kernels"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Empty where the library was not built; a test in test_cpu.py then fails if there is a compiler.
PATHS = [path for path in cpu.paths() if path != "torch"]


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Have everything on a CPU go one way."""
    with mock.patch.dict(os.environ, {cpu.VARIABLE: path}):
        yield


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor holds, so that -0 differs from 0 and NaN equals itself."""
    return tensor.reshape(-1).view(torch.uint8)


def assert_same(found: QuantizedTensor, wanted: QuantizedTensor) -> None:
    """Every field, bit for bit."""
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        if isinstance(b, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert torch.equal(bits(a), bits(b)), name
        else:
            assert a == b, name


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal weights of the usual size."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def walled(n: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor of 0xFF bytes whose end is the end of the process's memory: one byte further is a crash."""
    size = n * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    no_access = 0
    done = libc.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, no_access)
    assert done == 0, os.strerror(ctypes.get_errno())
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages * mmap.PAGESIZE - size)
    return flat.fill_(0xFF).view(dtype)
