"""Pages of bytes that are worked through in order, of which the device holds only some.

Those that fit stay there for good. The others lie on the host and pass through a ring of two buffers: while one page is
worked on the next is on its way in, and the one before on its way out. Every copy is asked for by name: no driver
guesses what to move.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_pipe.optim.lanes import Lanes, Mark

# One buffer is filled while the other is worked on and written back: a third would only wait.
_RING = 2

Backing = Callable[[int, int], Sequence[Tensor]]
"""Makes a number of host pages of a number of bytes each: uint8, zeros."""


class Moved(NamedTuple):
    """Pages and bytes that went to the device and came back from it."""

    pages_in: int = 0
    pages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def since(self, before: "Moved") -> "Moved":
        """What was moved between an earlier count and this one."""
        return Moved(*(now - then for now, then in zip(self, before, strict=True)))


class Pager:
    """`pages` pages of `page_bytes` bytes each, zeros at first; at most `resident` take memory on the device."""

    def __init__(
        self,
        *,
        pages: int,
        page_bytes: int,
        resident: int,
        device: torch.device,
        lanes: Lanes,
        backing: Backing,
    ) -> None:
        assert 1 <= resident <= pages
        ring = 0 if resident == pages else min(_RING, resident)
        self.pages, self.page_bytes = pages, page_bytes
        self.moved = Moved()
        self._staying = resident - ring
        self._lanes = lanes
        self._kept = torch.zeros(self._staying, page_bytes, dtype=torch.uint8, device=device)
        self._ring = torch.empty(ring, page_bytes, dtype=torch.uint8, device=device)
        self._host = backing(pages - self._staying, page_bytes) if ring else ()
        # What is queued in a buffer's memory by those who had it before comes first as well.
        self._free: list[Mark] = [lanes.mark() for _ in range(ring)]

    @property
    def resident_bytes(self) -> int:
        """The memory taken on the device."""
        return self._kept.numel() + self._ring.numel()

    def visit(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each page's index and its bytes on the device, to be changed before the next one is asked for.

        Whoever visits goes through to the end, and queues its work on the stream that is current here.
        """
        moving = range(self._staying, self.pages)
        ring = len(self._free)
        arriving = deque(self._bring(page) for page in moving[:ring])
        for page in range(self._staying):
            yield page, self._kept[page]
        for page in moving:
            slot, host = self._place(page)
            self._lanes.join(arriving.popleft())
            yield page, self._ring[slot]
            self._free[slot] = self._lanes.write_back(host, self._ring[slot], after=self._lanes.mark())
            self._count(pages_out=1)
            if page + ring < self.pages:
                arriving.append(self._bring(page + ring))

    def page(self, index: int) -> Tensor:
        """A page's bytes where they lie between two visits, on the device or the host, to be read or changed."""
        if index < self._staying:
            return self._kept[index]
        for mark in self._free:
            self._lanes.settle(mark)
        return self._place(index)[1]

    def _place(self, page: int) -> tuple[int, Tensor]:
        moving = page - self._staying
        return moving % len(self._free), self._host[moving]

    def _bring(self, page: int) -> Mark:
        # A page always passes through the same buffer. So what this waits for, the last way back from that buffer,
        # comes after the page's own way back in the visit before.
        slot, host = self._place(page)
        self._count(pages_in=1)
        return self._lanes.bring(self._ring[slot], host, after=self._free[slot])

    def _count(self, *, pages_in: int = 0, pages_out: int = 0) -> None:
        moved = (pages_in, pages_out, pages_in * self.page_bytes, pages_out * self.page_bytes)
        self.moved = Moved(*(before + more for before, more in zip(self.moved, moved, strict=True)))
