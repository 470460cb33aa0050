"""Who moves pages between the device and the host, and in which order with what is computed.

Lanes run beside the computation, one in each direction, and each does its copies one after the other. A mark is a point
in a lane or in the computation; what is told to come after a mark begins when everything before that is done.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_pipe.lanes import CudaLane

Mark = Any
"""What the lanes at hand give out; only they look into it."""


class Lanes(Protocol):
    """Copies of whole pages; nothing that is called here waits, save `settle`."""

    def mark(self) -> Mark:
        """A mark behind all that was computed so far."""

    def bring(self, buffer: Tensor, source: Tensor, *, after: Mark) -> Mark:
        """Copy from the host into a buffer on the device."""

    def write_back(self, target: Tensor, buffer: Tensor, *, after: Mark) -> Mark:
        """Copy from a buffer on the device to the host."""

    def join(self, mark: Mark) -> None:
        """Let what is computed from now on come after a mark."""

    def settle(self, mark: Mark) -> None:
        """Return when everything before a mark is done, so that the host may look at it."""


class HostLanes:
    """Lanes of a device that is the host itself: a copy is done when it is asked for."""

    def mark(self) -> Mark:
        return None

    def bring(self, buffer: Tensor, source: Tensor, *, after: Mark) -> Mark:
        assert after is None
        buffer.copy_(source)
        return None

    def write_back(self, target: Tensor, buffer: Tensor, *, after: Mark) -> Mark:
        assert after is None
        target.copy_(buffer)
        return None

    def join(self, mark: Mark) -> None:
        assert mark is None

    def settle(self, mark: Mark) -> None:
        assert mark is None


class CudaLanes:
    """Two lanes beside the stream that computes. With host pages that are not pinned the host waits."""

    def __init__(self, device: torch.device) -> None:
        self._inward, self._outward = (CudaLane(device) for _ in range(2))

    def mark(self) -> Mark:
        return self._inward.here()

    def bring(self, buffer: Tensor, source: Tensor, *, after: Mark) -> Mark:
        return self._inward.copy(buffer, source, after=after)

    def write_back(self, target: Tensor, buffer: Tensor, *, after: Mark) -> Mark:
        return self._outward.copy(target, buffer, after=after)

    def join(self, mark: Mark) -> None:
        mark.wait()

    def settle(self, mark: Mark) -> None:
        mark.finish()
