"""What a training step takes besides the base's weights, before a model is in memory."""

import torch

from qlora_pipe.architecture import Architecture, block_of, matches
from qlora_pipe.artifacts import Checkpoint, QuantizedCheckpoint

# A parameter of an adapter, its gradient and two moments, in float32 each.
_ADAPTER_BYTES = 16
# What a linear layer reads and writes, its gradients, and as much again between the layers.
_PASSES = 3
# The head's logits, a kernel's own memory, the allocator's gaps, the driver.
_SPARE_BYTES = 1 << 30


def step_bytes(
    base: Checkpoint | QuantizedCheckpoint, architecture: Architecture, *, rank: int, tokens: int, dtype: torch.dtype
) -> int:
    """Bytes of a step over so many tokens, roughly, where every block keeps its input alone and is computed again.

    Adapters of this rank with their gradients and moments, the blocks' inputs, and one block at work: its dense
    weights and what it keeps for backward.
    """
    adapters = dense = widths = narrowest = 0
    blocks: dict[str, list[tuple[int, ...]]] = {}
    for name in base.weights.names:
        shape = base.shape(name)
        # One of another rank belongs to no linear layer, which is told where it is loaded.
        if len(shape) == 2 and name.endswith(".weight") and matches(name.removesuffix(".weight"), architecture.adapt):
            adapters += rank * sum(shape)
            blocks.setdefault(block_of(name, architecture.blocks) or "", []).append(shape)
    for shapes in blocks.values():
        dense = max(dense, sum(outputs * inputs for outputs, inputs in shapes))
        widths = max(widths, sum(outputs + inputs for outputs, inputs in shapes))
        narrowest = max(narrowest, min(inputs for _, inputs in shapes))
    elements = dense + tokens * (len(blocks) * narrowest + _PASSES * widths)
    return adapters * _ADAPTER_BYTES + elements * dtype.itemsize + _SPARE_BYTES
