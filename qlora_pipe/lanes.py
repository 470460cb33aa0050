"""Copies beside the computation: a lane of their own on a GPU, and a stand-in for it on a CPU that proves their order.

What computes and what copies meet at marks: a copy may start after a mark of the computation, and the computation goes
on after a copy's own mark. Nothing here ever waits for the device but `Mark.finish`.
"""

from collections import deque
from threading import RLock
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A moment in the work that a device was given."""

    def wait(self) -> None:
        """Let what the calling thread computes from here on begin only after this moment."""

    def finish(self) -> None:
        """Return once the moment has come."""


class Lane(Protocol):
    """Copies in the order they are given, from any thread, while the device computes something else."""

    def here(self) -> Mark:
        """The end of all that the calling thread has computed so far."""

    def copy(self, target: Tensor, source: Tensor, *, after: Mark | None = None) -> Mark:
        """Copy a tensor to another of its size and type, not before `after`; gives the end of it.

        Until then the source must stay as it is, and nobody may look at the target.
        """


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's on a device, which is not waited for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def lane_on(device: torch.device) -> Lane:
    """A new lane: a stream of its own on a GPU, the stand-in elsewhere."""
    return CudaLane(device) if device.type == "cuda" else LateLane()


class CudaLane:
    """A CUDA stream. One side of each copy lies in pinned memory, or it would wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def here(self) -> "CudaMark":
        """As `Lane.here`, on the thread's current stream."""
        return CudaMark(torch.cuda.current_stream(self._device))

    def copy(self, target: Tensor, source: Tensor, *, after: Mark | None = None) -> "CudaMark":
        """As `Lane.copy`; `after` is a mark of this device."""
        with torch.cuda.stream(self._stream):
            if after is not None:
                after.wait()
            target.copy_(source, non_blocking=True)
            for tensor in (target, source):
                if tensor.is_cuda:
                    # Its memory is given to nobody else before the copy has ended.
                    tensor.record_stream(self._stream)
            return CudaMark(self._stream)


class CudaMark:
    """An event that a stream reaches."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._device = stream.device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        """As `Mark.wait`, on the thread's current stream."""
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def finish(self) -> None:
        """As `Mark.finish`."""
        self._event.synchronize()


class LateLane:
    """A stand-in on a CPU, as late as a lane may be: it copies only when somebody waits for it.

    From the moment a copy is given its target holds 0xFF in every byte, which is NaN to floating point. So whoever
    reads before waiting, gives a target away that is still in use, or a source that is, computes something else than
    with memory that never moves.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[LateMark, Tensor, Tensor]] = deque()
        self._lock = RLock()

    def here(self) -> "LateMark":
        """As `Lane.here`: what is computed on a CPU has ended."""
        return LateMark(self, done=True)

    def copy(self, target: Tensor, source: Tensor, *, after: Mark | None = None) -> "LateMark":
        """As `Lane.copy`, when its mark or a later one is waited for."""
        mark = LateMark(self)
        with self._lock:
            if after is not None:
                after.wait()
            target.view(torch.uint8).fill_(0xFF)
            self._waiting.append((mark, target, source))
        return mark

    def copy_up_to(self, mark: "LateMark") -> None:
        """Do the copies that were given before a mark's, and its own."""
        with self._lock:
            while not mark.done:
                reached, target, source = self._waiting.popleft()
                target.copy_(source)
                reached.done = True


class LateMark:
    """The end of a copy that may not have begun."""

    def __init__(self, lane: LateLane, *, done: bool = False) -> None:
        self._lane = lane
        self.done = done

    def wait(self) -> None:
        """As `Mark.wait`."""
        self._lane.copy_up_to(self)

    finish = wait
