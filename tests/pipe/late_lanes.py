"""Lanes for tests, which copy as late or as early as they may, and spoil what nobody may look at meanwhile."""

import random
from collections.abc import Callable

from torch import Tensor

# As float32 this is NaN, as a code the last there is.
SPOILT = 255


class Mark:
    """A point behind some work, which is done when somebody needs it."""

    def __init__(self, work: Callable[[], None] | None = None, *, time: int = 0) -> None:
        self._work = work
        self.time = time

    def reach(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()


class LateLanes:
    """A device that keeps the order it is told, and no other.

    A copy waits until something is told to come after it; by chance it goes ahead once it may. From the moment a copy
    may begin its target is spoilt, so whoever reads that too early, or has it overwritten too early, gets NaN.
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.computed = 0
        """To be raised by whoever computes with a page: what comes back must come after that."""
        self.waits = 0

    def mark(self) -> Mark:
        return Mark(time=self.computed)

    def bring(self, buffer: Tensor, source: Tensor, *, after: Mark) -> Mark:
        def copy() -> None:
            after.reach()
            buffer.copy_(source)

        if self._chance.random() < 0.5:
            after.reach()
            buffer.fill_(SPOILT)
        return self._begun(copy)

    def write_back(self, target: Tensor, buffer: Tensor, *, after: Mark) -> Mark:
        assert after.time == self.computed, "a page goes back before the work on it is done"
        target.fill_(SPOILT)

        def copy() -> None:
            after.reach()
            target.copy_(buffer)

        return self._begun(copy)

    def join(self, mark: Mark) -> None:
        mark.reach()

    def settle(self, mark: Mark) -> None:
        self.waits += 1
        mark.reach()

    def _begun(self, work: Callable[[], None]) -> Mark:
        mark = Mark(work, time=self.computed)
        if self._chance.random() < 0.2:
            mark.reach()
        return mark
