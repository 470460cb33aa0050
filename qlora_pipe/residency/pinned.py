"""Host memory that a GPU copies from at full speed, or reads by itself: pages that the driver was told to hold."""

import ctypes
import mmap
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from qlora_formats.hashing import usable_cores
from qlora_formats.tensorfile import TensorFile
from qlora_pipe.residency.feeder import MOST_THREADS, PIECE_BYTES
from qlora_pipe.residency.image import Image

# Of the driver's cuMemHostRegister: every context may use the pages, kernels may address them, nobody writes to them.
_FOR_ALL, _ADDRESSABLE, _READ_ONLY = 1, 2, 8


class HeldMemory:
    """Host memory whose pages the driver holds while this object lives: they are neither moved nor given away."""

    def __init__(self, memory: Tensor, driver: ctypes.CDLL) -> None:
        self.bytes = memory
        """uint8 [n]; once this object is gone it is memory like any other."""
        # What is passed on keeps the memory until it is let go.
        weakref.finalize(self, _let_go, driver, memory)


def hold(memory: Tensor, *, read_only: bool = False) -> HeldMemory | None:
    """Ask the driver to hold memory, uint8 [n], for the current GPU; None where it does not.

    It is asked itself: of the CUDA runtime, a refusal would be taken for the failure of the next kernel.
    """
    driver = _driver()
    if driver is None:
        return None
    flags = _FOR_ALL | _ADDRESSABLE | (_READ_ONLY if read_only else 0)
    refused = driver.cuMemHostRegister_v2(
        ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel()), ctypes.c_uint(flags)
    )
    return None if refused else HeldMemory(memory, driver)


def _let_go(driver: ctypes.CDLL, memory: Tensor) -> None:
    # A copy from it may be on its way.
    driver.cuCtxSynchronize()
    driver.cuMemHostUnregister(ctypes.c_void_p(memory.data_ptr()))


@cache
def _driver() -> ctypes.CDLL | None:
    if not torch.cuda.is_available():
        return None
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def read_images(images: Sequence[Image], *, room: int) -> list[HeldMemory | None]:
    """Read images into memory that the driver holds, in the order given; None for those that it does not hold.

    At most `room` bytes are taken. Several threads read.
    """
    found: list[HeldMemory | None] = []
    with ThreadPoolExecutor(min(MOST_THREADS, usable_cores()), thread_name_prefix="image") as pool:
        for image in images:
            room -= image.n_bytes
            made = _read_image(image, pool) if room >= 0 and None not in found else None
            found.append(made)
    return found


def _read_image(image: Image, pool: ThreadPoolExecutor) -> HeldMemory | None:
    memory = anonymous(image.n_bytes)
    pieces = [(piece, memory[piece.at : piece.at + piece.n_bytes]) for piece in image.pieces(PIECE_BYTES)]
    for reading in [pool.submit(piece.read, out) for piece, out in pieces]:
        reading.result()
    return hold(memory)


def anonymous(n_bytes: int) -> Tensor:
    """New memory uint8 [n_bytes] that starts on a page, in large pages where the system has them.

    torch's own pinned memory comes in powers of two: a block of 441 MB would take 512.
    """
    pages = mmap.mmap(-1, max(n_bytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=n_bytes)


def hold_file(file: TensorFile) -> HeldMemory | None:
    """Let the driver hold a file's own pages in the system's cache, with no second copy; None where it does not.

    All of the file is read. The memory is never to be written to.
    """
    pages = file.shared()
    # All of it is needed at once, and page by page a cold disk would take its time.
    pages.madvise(mmap.MADV_WILLNEED)
    with warnings.catch_warnings():
        # torch has no notion of memory that cannot be written to.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        memory = torch.frombuffer(pages, dtype=torch.uint8)
    return hold(memory, read_only=True)
