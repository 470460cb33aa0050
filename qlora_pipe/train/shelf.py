"""States between blocks, set aside in the host's memory until backward comes to them."""

from collections import deque

import torch
from torch import Tensor

from qlora_pipe.lanes import Lane, Mark, lane_on

# Copies that may be on their way at a time: more would keep more states on the device.
_ON_THE_WAY = 2


class Shelved:
    """One state that was set aside, its place in the host's memory, and where it is on the way back."""

    def __init__(self, place: Tensor, *, like: Tensor) -> None:
        self.place = place
        self.shape, self.device = like.shape, like.device
        self.back: tuple[Tensor, Mark] | None = None


class Shelf:
    """Copies states to the host beside the computation, and back in time for their use.

    The places are pinned memory where there is a GPU, taken once and used again in every pass. On a CPU it is a
    stand-in, which shows that nothing is used before it is there.
    """

    def __init__(self, device: torch.device) -> None:
        self._lane: Lane = lane_on(device)
        self._pinned = device.type == "cuda"
        self._free: list[Tensor] = []
        self._leaving: deque[tuple[Tensor, Mark]] = deque()

    def put(self, state: Tensor) -> Shelved:
        """Set a state aside; its own memory is free once it has been copied."""
        while len(self._leaving) >= _ON_THE_WAY:
            self._let_go()
        shelved = Shelved(self._place_for(state), like=state)
        flat = state.contiguous().view(-1)
        mark = self._lane.copy(shelved.place, flat, after=self._lane.here())
        self._leaving.append((flat, mark))
        return shelved

    def fetch(self, shelved: Shelved) -> None:
        """Begin to bring a state back; does nothing where that has begun."""
        if shelved.back is None:
            while self._leaving:
                self._let_go()
            flat = torch.empty_like(shelved.place, device=shelved.device)
            shelved.back = flat, self._lane.copy(flat, shelved.place, after=self._lane.here())

    def take(self, shelved: Shelved) -> Tensor:
        """The state, on its device again; its place is free for another."""
        self.fetch(shelved)
        assert shelved.back is not None
        flat, mark = shelved.back
        mark.wait()
        # A copy into this place goes along the same lane, and so comes later.
        self._free.append(shelved.place)
        return flat.view(shelved.shape)

    def _let_go(self) -> None:
        # What is computed from here on may get this memory, and so must come after the copy.
        _, mark = self._leaving.popleft()
        mark.wait()

    def _place_for(self, state: Tensor) -> Tensor:
        for number, place in enumerate(self._free):
            if place.numel() == state.numel() and place.dtype == state.dtype:
                return self._free.pop(number)
        return torch.empty(state.numel(), dtype=state.dtype, pin_memory=self._pinned)
