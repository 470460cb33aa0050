"""A few slots on the device that a model's blocks pass through, each brought in while the one before computes.

Blocks run in order, forward with rising numbers, backward with falling ones. Block i always lies in slot i modulo n,
so its tensors are views made once, and what autograd keeps of a block is still right when the block is back for its
backward. The next block in the current direction is brought as soon as the slot it goes to is free; at a turn of the
direction the blocks are still there. Frozen weights are only read: nothing is ever brought back.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qlora_pipe.lanes import Lane, Mark
from qlora_pipe.residency.choice import Way
from qlora_pipe.residency.pinned import HeldMemory


class Coming(Protocol):
    """A block on its way."""

    def wait(self) -> None:
        """Let what is computed from here on use it."""


Send = Callable[[int, Tensor, Mark | None], Coming]
"""Begin to bring the block of a number into a slot, uint8, not before a mark of the computation."""


@dataclass
class _Slot:
    bytes: Tensor
    holds: int | None = None
    coming: Coming | None = None
    """What `holds` names, while nobody has waited for it."""
    left: Mark | None = None
    """The last moment of the computation that used it."""


class Ring:
    """Keeps the block that computes, and the next ones, in n slots; every slot takes every block."""

    way: Way = "streamed"
    prefers_layer_major = True

    def __init__(
        self,
        *,
        sizes: Sequence[int],
        slots: Sequence[Tensor],
        send: Send,
        lane: Lane,
        held: Sequence[HeldMemory | None] = (),
    ) -> None:
        """`sizes`: the bytes of each block; `held`: the host memory that `send` takes them from, as far as it does."""
        self._sizes = sizes
        self._n_blocks = len(sizes)
        # Known under another name: autograd would think that what it keeps of a block were overwritten for good.
        # Their memory may be another's whose last use the device has not come to.
        self._slots = [_Slot(slot.data, left=lane.here()) for slot in slots]
        self._send = send
        self._lane = lane
        self._current: int | None = None
        self._rising = True
        self.held = held
        self.blocks_brought = 0
        """How often a block was copied into a slot."""
        self.bytes_brought = 0

    def enter(self, number: int, *, around: bool = False) -> None:
        """Let what is computed from here on use the block of this number, until another one is entered.

        `around`: after the last block the first one comes again, as in evaluation and generation.
        """
        if number == self._current and self._slot_of(number).coming is None:
            return
        if self._current is not None:
            self._slot_of(self._current).left = self._lane.here()
            self._rising = number > self._current
        # There is nothing beyond the ends.
        self._rising = (self._rising or number == 0) and (around or number < self._n_blocks - 1)
        self._current = number
        self._bring(number)
        slot = self._slot_of(number)
        if slot.coming is not None:
            slot.coming.wait()
            slot.coming = None
        for following in self._following(number, around=around):
            self._bring(following)

    def _following(self, number: int, *, around: bool) -> Iterator[int]:
        """The blocks expected next that do not take a slot from those before them, nearest first."""
        taken = {number % len(self._slots)}
        for distance in range(1, min(len(self._slots), self._n_blocks)):
            following = number + distance if self._rising else number - distance
            if around:
                following %= self._n_blocks
            if not 0 <= following < self._n_blocks or following % len(self._slots) in taken:
                return
            taken.add(following % len(self._slots))
            yield following

    def _bring(self, number: int) -> None:
        slot = self._slot_of(number)
        if slot.holds == number:
            return
        if slot.coming is not None:
            # Guessed wrongly: two on their way to one slot could arrive mixed.
            slot.coming.wait()
        slot.coming = self._send(number, slot.bytes, slot.left)
        slot.holds = number
        self.blocks_brought += 1
        self.bytes_brought += self._sizes[number]

    def _slot_of(self, number: int) -> _Slot:
        return self._slots[number % len(self._slots)]
