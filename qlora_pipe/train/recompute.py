"""Which blocks keep what their backward needs, and which are computed again: as many kept as memory allows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pipe.config import Recompute
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
        self._planned: dict[int, int] = {}

    def choose(
        self, blocks: Sequence[nn.Module], states: Sequence[Tensor], told: Sequence[Any]
    ) -> Callable[[int], bool]:
        """For batches with these states [B, T, D] before the first block: whether the block of a number is kept."""
        if self.mode == "auto":
            tokens = sum(state.shape[:-1].numel() for state in states)
            if tokens not in self._planned:
                longest = max(range(len(states)), key=lambda each: states[each].numel())
                share = bytes_kept(blocks[-1], states[longest], told[longest]) / states[longest].shape[:-1].numel()
                self._planned[tokens] = self._fitting(blocks, states, int(share * tokens))
            self.kept = self._planned[tokens]
        else:
            self.kept = len(blocks) if self.mode == "none" else 0
        first_kept = len(blocks) - self.kept
        return lambda number: number >= first_kept

    def _fitting(self, blocks: Sequence[nn.Module], states: Sequence[Tensor], bytes_per_block: int) -> int:
        """How many blocks can keep everything, when all keep at least their input and one is being computed again."""
        state = states[0]
        inputs = len(blocks) * sum(each.numel() for each in states) * state.element_size()
        dense = max(map(dense_count, blocks)) * state.element_size()
        free = self._free(state.device)
        room = free - int(free * _SPARE_SHARE) - _SPARE_BYTES - inputs - dense - bytes_per_block
        return max(0, min(len(blocks), room // max(1, bytes_per_block)))


def bytes_kept(block: nn.Module, state: Tensor, told: Any) -> int:
    """What autograd keeps of a block's forward pass besides its input and weights, in bytes: tried out, not guessed."""
    apart = {part.untyped_storage().data_ptr() for part in (*block.parameters(), *block.buffers())}
    # The state of a model that is one block is its ids.
    before = state.detach().requires_grad_(state.is_floating_point())
    apart.add(before.untyped_storage().data_ptr())
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
        after: Tensor = block(before, told)
    for layer, seed in seeds.items():
        layer.seed = seed
    return sum(found.values()) + after.numel() * after.element_size()


def dense_count(block: nn.Module) -> int:
    """The weights of a block that are packed in 4 bits: so many elements its dense weights take."""
    parts = (part for part in block.modules() if isinstance(part, QuantizedLinear))
    return sum(part.out_features * part.in_features for part in parts)
