"""The key-value cache: what attention remembers of the tokens it has seen."""

from typing import Protocol

import torch
from torch import Tensor

from qlora_kernels.decode_attention import decode_attention
from qlora_kernels.rotary import rotate
from qlora_pipe.nn.attention import PLAIN, Scores, causal_attention
from qlora_pipe.nn.rotary import Rotary


class Cache(Protocol):
    """What a model asks of a cache. In one forward pass every layer calls `attend`, then the model `advance` once."""

    def turns(self, rotary: Rotary, count: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [count, head_dim] of the next positions, in the type and on the device of `like`."""

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        cosines: Tensor,
        sines: Tensor,
        scores: Scores = PLAIN,
    ) -> Tensor:
        """Turn queries [B, H, T, D] and keys [B, KV, T, D], store keys and values, attend to all; [B, T, H * D].

        `scores` says how the layer's attention makes its scores: its window, its cap and its scale.
        """

    def advance(self, positions: int) -> None:
        """Count positions as filled, after every layer has stored them."""


class KVCache:
    """Keys and values of every layer, allocated once.

    keys[layer] and values[layer] are [batch, kv_heads, capacity, head_dim], of which the first `length` positions are
    filled.
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
        self.stored: Tensor = torch.empty((2, layers, batch, kv_heads, capacity, head_dim), dtype=dtype, device=device)
        self.keys, self.values = (part.unbind() for part in self.stored)
        self.capacity = capacity
        self.length = 0

    def turns(self, rotary: Rotary, count: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of the positions behind the filled ones."""
        end = self.length + count
        return rotary.tables(torch.arange(self.length, end, device=like.device), length=end, like=like)

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        cosines: Tensor,
        sines: Tensor,
        scores: Scores = PLAIN,
    ) -> Tensor:
        """Attend from T tokens to themselves and the filled positions; ValueError where there is no room for them."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {end} were to be stored.")
        self.keys[layer][:, :, self.length : end] = rotate(keys, cosines, sines)
        self.values[layer][:, :, self.length : end] = values
        seen_keys, seen_values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        return causal_attention(rotate(queries, cosines, sines), seen_keys, seen_values, scores=scores)

    def advance(self, positions: int) -> None:
        """Count positions as filled, after every layer has stored them."""
        self.length += positions

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] holds, int64 [B]; B may be another than it was."""
        filled = self.stored[:, :, :, :, : self.length].index_select(2, rows)
        if filled.shape[2] != self.stored.shape[2]:
            self.stored = self.stored.new_empty((*filled.shape[:4], self.capacity, filled.shape[5]))
            self.keys, self.values = (part.unbind() for part in self.stored)
        self.stored[:, :, :, :, : self.length] = filled


class StepCache:
    """A cache for forward passes of one token that are all the same work: `position`, int64 [1], lies on the device.

    Nothing that the host does in a pass depends on how much is filled, so a pass can be captured in a CUDA graph. Who
    replays it sees to it that the position stays below the capacity.
    """

    def __init__(self, start: "KVCache | StepCache", *, capacity: int) -> None:
        filled = start.stored
        self.stored: Tensor = filled.new_empty((*filled.shape[:4], capacity, filled.shape[5]))
        self.keys, self.values = (part.unbind() for part in self.stored)
        self.capacity = capacity
        self.position = torch.zeros(1, dtype=torch.int64, device=filled.device)
        self._tables: Tensor | None = None
        self.take(start)

    def take(self, other: "KVCache | StepCache") -> None:
        """Hold what another cache of the same model holds, and nothing else."""
        filled = other.length if isinstance(other, KVCache) else other.capacity
        self.stored[..., :filled, :] = other.stored[..., :filled, :]
        if isinstance(other, KVCache):
            self.position.fill_(other.length)
        else:
            self.position.copy_(other.position)

    def turns(self, rotary: Rotary, count: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of the next position, out of one for all that is made in the first pass."""
        if count != 1:
            raise ValueError(f"a step is one token; {count} were given.")
        if self._tables is None:
            self._tables = rotary.step_tables(self.capacity, like=like)
        cosines, sines = self._tables.index_select(0, self.position).unbind(1)
        return cosines, sines

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        cosines: Tensor,
        sines: Tensor,
        scores: Scores = PLAIN,
    ) -> Tensor:
        """Attend from one token to itself and the filled positions."""
        return decode_attention(
            queries,
            keys,
            values,
            cached_keys=self.keys[layer],
            cached_values=self.values[layer],
            position=self.position,
            cosines=cosines,
            sines=sines,
            window=scores.window,
            softcap=scores.softcap,
            scale=scores.scale,
        )

    def advance(self, positions: int) -> None:
        """Count the token as stored."""
        self.position += positions
