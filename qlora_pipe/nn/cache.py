"""The key-value cache: what attention remembers of the tokens it has seen."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, allocated once.

    keys[layer] and values[layer] are [batch, kv_heads, capacity, head_dim], of which the first `length` positions are
    filled. In one forward pass every layer calls `update`, then the model calls `advance` once.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, batch, kv_heads, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device).unbind()
        self.values = torch.empty(shape, dtype=dtype, device=device).unbind()
        self.capacity = capacity
        self.length = 0

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions [batch, kv_heads, T, head_dim] after the filled ones; give views of all, new included.

        ValueError where they don't fit in the capacity.
        """
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {end} were to be stored.")
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, positions: int) -> None:
        """Count positions as filled, after every layer has stored them."""
        self.length += positions
