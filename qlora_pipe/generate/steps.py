"""What runs a model token by token, and the plain way of doing so."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qlora_pipe.nn.cache import Cache, KVCache


class CausalModel(Protocol):
    """What generation asks of a causal model, whatever its family."""

    training: bool

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""

    def hidden(self, ids: Tensor, *, cache: Cache | None = None) -> Tensor:
        """Ids [B, T] -> last hidden states [B, T, D], the tokens added to the cache."""

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., vocabulary]."""

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache."""


class Steps(Protocol):
    """One text at a time, read once and then continued by a token at a time."""

    @property
    def logits(self) -> Tensor:
        """What the model says comes next, float32 [vocabulary] on its device; good until the next step."""

    def begin(self, ids: Sequence[int], *, room: int) -> None:
        """Read a text that up to `room` tokens will follow, and forget any other."""

    def go_on(self, token: int) -> None:
        """Read one more token."""

    def likeliest(self, count: int) -> Iterator[tuple[float, int]]:
        """Yield the logit and the id of the likeliest token `count` times, each read before the next."""


class EagerSteps:
    """Every step by itself, on any device and with weights that may move between steps."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model

    @property
    def logits(self) -> Tensor:
        """What comes next, float32 [vocabulary]."""
        return self._logits

    def begin(self, ids: Sequence[int], *, room: int) -> None:
        """Read a text that up to `room` tokens will follow, and forget any other."""
        self._cache = self._model.new_cache(1, len(ids) + room)
        self._logits = read(self._model, ids, self._cache)

    def go_on(self, token: int) -> None:
        """Read one more token."""
        self._logits = read(self._model, [token], self._cache)

    def likeliest(self, count: int) -> Iterator[tuple[float, int]]:
        """Yield the likeliest token `count` times, each read before the next."""
        for number in range(count):
            top, token = self._logits.max(-1)
            likeliest = int(token)
            yield float(top), likeliest
            if number + 1 < count:
                self.go_on(likeliest)


# The mode must not outlive a step: a generator's caller runs between its steps.
@torch.inference_mode()
def read(model: CausalModel, ids: Sequence[int], cache: KVCache) -> Tensor:
    """Add tokens to a cache; gives the last one's logits, float32 [vocabulary]."""
    states = model.hidden(torch.tensor([ids], device=cache.stored.device), cache=cache)
    return model.head(states[:, -1:])[0, 0].float()
