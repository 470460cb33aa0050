"""Where an optimizer's states are kept: what the device may hold of them, and what holds the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qlora_formats.commit import scratch_memory
from qlora_pipe.optim.lanes import CudaLanes, HostLanes, Lanes
from qlora_pipe.optim.pager import Backing

_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How states are kept on a device."""

    lanes: Lanes
    backing: Backing
    budget: Callable[[], int | None]
    """Bytes that they may take on the device, asked for when the first step is due; None for as many as they need."""
    largest_page: int = 32 * _MIB


def storage_for(device: torch.device, *, budget: int | Literal["auto"], scratch: Path) -> Storage:
    """Keep what exceeds `budget` MiB of a GPU in pinned memory, and of a CPU's memory in a file beside `scratch`.

    "auto" is all that is left of a GPU's memory after the first step's forward and backward, and no limit on a CPU.
    """
    if device.type == "cuda":
        return Storage(
            lanes=CudaLanes(device),
            backing=pinned_pages,
            budget=partial(memory_left, device) if budget == "auto" else lambda: budget * _MIB,
        )
    return Storage(
        lanes=HostLanes(),
        backing=partial(mapped_pages, scratch),
        budget=lambda: None if budget == "auto" else budget * _MIB,
    )


def memory_left(device: torch.device) -> int:
    """Bytes of a GPU that nothing has used yet, at the peak so far of this process, less a tenth of all for comfort.

    What torch has reserved beyond that peak counts as unused; so do longer batches than any seen, hence the tenth.
    """
    free, total = torch.cuda.mem_get_info(device)
    spare = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return max(0, free + spare - total // 10)


def pinned_pages(pages: int, page_bytes: int) -> Sequence[Tensor]:
    """Pages in pinned host memory, each by itself: the allocator rounds up to powers of two, which a page nearly is."""
    return [torch.zeros(page_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(pages)]


def mapped_pages(scratch: Path, pages: int, page_bytes: int) -> Sequence[Tensor]:
    """Pages in a file without a name on the disk of `scratch`; CommitError "disk" where that has no room."""
    memory = scratch_memory(scratch, pages * page_bytes)
    return list(torch.frombuffer(memory, dtype=torch.uint8).view(pages, page_bytes).unbind())
