"""Which blocks keep what their backward needs, and which are computed again: as many kept as memory allows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pipe.config import Recompute
from qlora_pipe.nn.language import State, state_of, tensors_of
from qlora_pipe.nn.linear import LoraLinear, QuantizedLinear
from qlora_pipe.train.memory import free_bytes

# What is left free for what is not foreseen here: the head's chunk of logits, the allocator's gaps, the driver.
_SPARE_SHARE = 0.1
_SPARE_BYTES = 256 << 20


class RecomputePlan:
    """Chooses for each pass; the result of a pass is the same whatever it chooses.

    Blocks at the end are kept first: backward reaches them at once, and what they keep is freed soonest.
    """

    def __init__(self, mode: Recompute, *, free: Callable[[torch.device], int] = free_bytes) -> None:
        self.mode = mode
        self.kept: int | None = None
        """Blocks kept in the last pass."""
        self._free = free
        self._planned: dict[tuple[int, ...], int] = {}

    def choose(
        self, blocks: Sequence[nn.Module], states: Sequence[State], told: Sequence[Any]
    ) -> Callable[[int], bool]:
        """For batches with these states before the first block: whether the block of a number is kept."""
        if self.mode == "auto":
            lengths = tuple(sum(counts) for counts in zip(*map(_tokens, states), strict=True))
            if lengths not in self._planned:
                self._planned[lengths] = self._fitting(blocks, states, told)
            self.kept = self._planned[lengths]
        else:
            self.kept = len(blocks) if self.mode == "none" else 0
        first_kept = len(blocks) - self.kept
        return lambda number: number >= first_kept

    def _fitting(self, blocks: Sequence[nn.Module], states: Sequence[State], told: Sequence[Any]) -> int:
        """How many blocks can keep everything, when all keep at least their input and one is being computed again."""
        parts = [part for state in states for part in tensors_of(state)]
        inputs = len(blocks) * sum(part.numel() for part in parts) * parts[0].element_size()
        dense = max(map(dense_count, blocks)) * parts[0].element_size()
        free = self._free(parts[0].device)
        counts = [sum(_tokens(state)) for state in states]
        longest = counts.index(max(counts))
        # Blocks of one kind keep alike: the last of each is tried out.
        last = {type(block): block for block in blocks}
        kept = {
            kind: int(bytes_kept(block, states[longest], told[longest]) / counts[longest] * sum(counts))
            for kind, block in last.items()
        }
        room = free - int(free * _SPARE_SHARE) - _SPARE_BYTES - inputs - dense - max(kept.values())
        fitting = 0
        for block in reversed(blocks):
            room -= kept[type(block)]
            if room < 0:
                break
            fitting += 1
        return fitting


def _tokens(state: State) -> tuple[int, ...]:
    """How many positions each tensor of a state has, in all its rows."""
    return tuple(part.shape[:-1].numel() for part in tensors_of(state))


def bytes_kept(block: nn.Module, state: State, told: Any) -> int:
    """What autograd keeps of a block's forward pass besides its input and weights, in bytes: tried out, not guessed."""
    # The state of a model that is one block is its ids.
    before = state_of([part.detach().requires_grad_(part.is_floating_point()) for part in tensors_of(state)])
    apart = {part.untyped_storage().data_ptr() for part in (*block.parameters(), *block.buffers(), *tensors_of(before))}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    seeds = {layer: layer.seed for layer in block.modules() if isinstance(layer, LoraLinear)}
    for layer in seeds:
        # A trial must not move the generator that the run's own masks are drawn from.
        layer.seed = 0
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad():
        after: State = block(before, told)
    for layer, seed in seeds.items():
        layer.seed = seed
    made = [part for part in tensors_of(after) if part.untyped_storage().data_ptr() not in apart]
    return sum(found.values()) + sum(part.numel() * part.element_size() for part in made)


def dense_count(block: nn.Module) -> int:
    """The weights of a block that are packed in 4 bits: so many elements its dense weights take."""
    parts = (part for part in block.modules() if isinstance(part, QuantizedLinear))
    return sum(part.out_features * part.in_features for part in parts)
