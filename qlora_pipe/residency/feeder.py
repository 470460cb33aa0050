"""Bring images from files to the device: several threads read, through pinned memory, while a lane copies."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_formats.hashing import usable_cores
from qlora_pipe.lanes import Lane, Mark
from qlora_pipe.residency.image import Image, Stretch

# Large enough that a copy's start costs little, small enough that the first one starts soon.
PIECE_BYTES = 8 << 20
# One thread reads some 8 GB a second from the page cache, and PCIe 5 takes 50.
MOST_THREADS = 12


class Sending(NamedTuple):
    """An image on its way: the copies of its pieces, each given to the lane when the piece was read."""

    copies: Sequence[Future[Mark]]

    def wait(self) -> None:
        """Let what the calling thread computes from here on use the image; raises what a thread met on its way."""
        for copy in self.copies:
            copy.result().wait()

    def finish(self) -> None:
        """Return once the image is there."""
        for copy in self.copies:
            copy.result().finish()


class Feeder:
    """Threads with two pinned buffers each: while one is copied to the device, the next piece is read into the other.

    They end when nothing refers to the Feeder any more.
    """

    def __init__(self, lane: Lane, device: torch.device, *, threads: int = 0, piece_bytes: int = PIECE_BYTES) -> None:
        self._lane = lane
        self._device = device
        self._piece_bytes = piece_bytes
        self._own = local()
        threads = threads or min(MOST_THREADS, usable_cores())
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="feeder")

    def send(self, image: Image, target: Tensor, *, after: Mark | None = None) -> Sending:
        """Begin to bring an image to `target`, uint8 [n_bytes or more] on the device, not before the mark `after`."""
        pieces = image.pieces(self._piece_bytes)
        return Sending([self._pool.submit(self._bring, piece, target, after) for piece in pieces])

    def close(self) -> None:
        """Let the threads end; what has not begun to be read is not read."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _bring(self, piece: Stretch, target: Tensor, after: Mark | None) -> Mark:
        buffers = self._buffers()
        if len(buffers) == 2:
            buffer, used = buffers.popleft()
            used.finish()
        else:
            buffer = torch.empty(self._piece_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        read = buffer[: piece.n_bytes]
        piece.read(read)
        mark = self._lane.copy(target[piece.at : piece.at + piece.n_bytes], read, after=after)
        buffers.append((buffer, mark))
        return mark

    def _buffers(self) -> deque[tuple[Tensor, Mark]]:
        """The calling thread's own buffers, and the last copy from each."""
        if not hasattr(self._own, "buffers"):
            self._own.buffers = deque()
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
        found: deque[tuple[Tensor, Mark]] = self._own.buffers
        return found
