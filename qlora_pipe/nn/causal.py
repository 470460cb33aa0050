"""What every causal language model is: an embedding, blocks one after the other, a last norm, a head."""

import abc
from typing import Any

from torch import Tensor

from qlora_pipe.nn.cache import Cache, KVCache
from qlora_pipe.nn.language import Inputs, LanguageModel
from qlora_pipe.nn.packing import Packing


class CausalModel(LanguageModel):
    """A causal language model: its state is one tensor [B, T, D]."""

    @abc.abstractmethod
    def embed(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> tuple[Tensor, Any]:
        """Ids [B, T] -> the state [B, T, D] before the first block, and what every block is told besides it.

        The second is one object, never changed by a block; positions, masks, the cache and the packing travel in it.
        A packing says where in the rows samples begin that must not see each other; it comes only where the
        Architecture says `packs`, and never together with a cache.
        """

    def begin(self, inputs: Inputs) -> tuple[Tensor, Any]:
        """Embed a batch's ids."""
        return self.embed(inputs.ids, packing=inputs.packing)

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
