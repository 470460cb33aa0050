"""What every causal language model is: an embedding, blocks one after the other, a last norm, a head."""

import abc
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qlora_pipe.nn.cache import Cache, KVCache
from qlora_pipe.nn.packing import Packing


class CausalModel(nn.Module, abc.ABC):
    """A causal language model, cut where training and memory need it cut.

    Training runs it block by block: it keeps the state before a block and recomputes the rest, and brings a block's
    weights in while the one before still computes. So all that is quantised or adapted lies in a block, but the head.
    """

    @property
    @abc.abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in the order they run. Each is called with the state [B, T, D] and what `embed` gave besides."""

    @abc.abstractmethod
    def embed(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> tuple[Tensor, Any]:
        """Ids [B, T] -> the state [B, T, D] before the first block, and what every block is told besides it.

        The second is one object, never changed by a block; positions, masks, the cache and the packing travel in it.
        A packing says where in the rows samples begin that must not see each other; it comes only where the
        Architecture says `packs`, and never together with a cache.
        """

    @abc.abstractmethod
    def finish(self, state: Tensor) -> Tensor:
        """The state [B, T, D] after the last block -> the hidden states [B, T, D] that the head reads."""

    @abc.abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., vocabulary]."""

    @property
    def head_weight(self) -> Tensor | None:
        """The matrix [vocabulary, D] where the head is the product with it, frozen; then no logits are ever kept."""
        return None

    def hidden(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> Tensor:
        """Ids [B, T] -> the last hidden states [B, T, D].

        Padding goes to the right, where attention never looks. With a cache, `ids` go on from what it holds, and are
        added to it. With a packing, rows hold several samples, none of which sees another.
        """
        state, told = self.embed(ids, cache=cache, packing=packing)
        for block in self.blocks:
            state = block(state, told)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.finish(state)

    def forward(self, ids: Tensor, *, cache: Cache | None = None) -> Tensor:
        """Ids [B, T] -> logits [B, T, vocabulary]."""
        return self.head(self.hidden(ids, cache=cache))

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the config vouches for; `generate` asks for it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how long its context is")

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache for `batch` sequences of up to `capacity` tokens; `generate` asks for it."""
        raise NotImplementedError(f"{type(self).__name__} has no cache")
