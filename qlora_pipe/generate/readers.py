"""How models read tokens: rows of them side by side, each remembered in the model's cache."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qlora_pipe.nn.cache import Cache, KVCache
from qlora_pipe.nn.seq2seq import Seq2SeqModel


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


class Reader(Protocol):
    """A model that reads one text, and then goes on from it in several rows."""

    def begin(self, ids: Sequence[int], *, room: int, rows: int = 1) -> Tensor:
        """Read a text that up to `room` tokens will follow, and forget any other.

        Every row holds it then. Gives what comes next: logits, float32 [rows, vocabulary], on the model's device.
        """

    def go_on(self, tokens: Tensor) -> Tensor:
        """Read one more token in each row, int64 [rows]; gives the logits of what comes next."""

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] holds, int64 [rows]."""


# The mode must not outlive a step: a generator's caller runs between its steps.
@torch.inference_mode()
def read(model: CausalModel, ids: Tensor, cache: KVCache) -> Tensor:
    """Add tokens [B, T] to a cache; gives the logits after the last ones, float32 [B, vocabulary]."""
    states = model.hidden(ids, cache=cache)
    return model.head(states[:, -1:])[:, 0].float()


class CausalReader:
    """Reads with a causal model and its key-value cache."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model

    @torch.inference_mode()
    def begin(self, ids: Sequence[int], *, room: int, rows: int = 1) -> Tensor:
        """Read the text once, whatever the number of rows."""
        self._cache = self._model.new_cache(1, len(ids) + room)
        text = torch.tensor([ids], device=self._cache.stored.device)
        logits = read(self._model, text, self._cache)
        if rows > 1:
            self._cache.reorder(torch.zeros(rows, dtype=torch.int64, device=text.device))
        return logits.expand(rows, -1)

    def go_on(self, tokens: Tensor) -> Tensor:
        """Read one more token in each row."""
        return read(self._model, tokens[:, None], self._cache)

    @torch.inference_mode()
    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] holds."""
        self._cache.reorder(rows)


class Seq2SeqReader:
    """Reads with an encoder-decoder model: its encoder has read the source, its decoder reads what is generated."""

    def __init__(self, model: Seq2SeqModel, source_ids: Sequence[int]) -> None:
        self._model = model
        self._source = torch.tensor([source_ids], device=_device_of(model))

    @torch.inference_mode()
    def begin(self, ids: Sequence[int], *, room: int, rows: int = 1) -> Tensor:
        """Encode the source once, whatever the number of rows, and let the decoder read `ids`."""
        lengths = torch.full((1,), self._source.shape[1], device=self._source.device)
        memory = self._model.encode(self._source, lengths)
        self._cache = self._model.new_cache(memory.repeat(rows, 1, 1), lengths.repeat(rows), capacity=len(ids) + room)
        return self._read(torch.tensor([ids] * rows, device=self._source.device))

    def go_on(self, tokens: Tensor) -> Tensor:
        """Read one more token in each row."""
        return self._read(tokens[:, None])

    @torch.inference_mode()
    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] holds."""
        self._cache.reorder(rows)

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> Tensor:
        states = self._model.decode(ids, cache=self._cache)
        return self._model.head(states[:, -1:])[:, 0].float()


def _device_of(model: Seq2SeqModel) -> torch.device:
    """Where a model computes: blocks may lie elsewhere until they are needed, what is in none of them does not."""
    in_blocks = {id(parameter) for block in model.blocks for parameter in block.parameters()}
    outside = (parameter for parameter in model.parameters() if id(parameter) not in in_blocks)
    # Where all lies in blocks, they stay where they are.
    return next(outside, next(model.parameters())).device
