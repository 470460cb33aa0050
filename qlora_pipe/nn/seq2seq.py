"""What every model is that maps a source to a target: an encoder that reads all of the one, a decoder for the other."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.language import LanguageModel

KeysAndValues = tuple[Tensor, Tensor]


class Seq2SeqCache(Protocol):
    """What decoding remembers of its rows: keys and values of the source, and of the target as far as it is read."""

    length: int
    """Target tokens that are stored."""

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] holds, int64 [B]: which beams live on."""


class Seq2SeqModel(LanguageModel):
    """An encoder-decoder model.

    What it hands from block to block is the pair of the source's and the target's states, [B, S, D] and [B, T, D]; the
    blocks of the encoder come first and leave the target alone, as those of the decoder do with the source.
    """

    @property
    @abc.abstractmethod
    def start_id(self) -> int:
        """The id that the decoder begins with."""

    @abc.abstractmethod
    def encode(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        """Ids [B, S] and how many of each row are no padding [B] -> the encoder's hidden states [B, S, D]."""

    @abc.abstractmethod
    def new_cache(self, memory: Tensor, source_lengths: Tensor, *, capacity: int) -> Seq2SeqCache:
        """Make the cache for decoding up to `capacity` tokens over what `encode` gave."""

    @abc.abstractmethod
    def decode(self, ids: Tensor, *, cache: Seq2SeqCache) -> Tensor:
        """Ids [B, T] that go on from what the cache holds -> hidden states [B, T, D]; they are added to it."""


def start_id_of(config: Mapping[str, Any]) -> int:
    """The id that a decoder begins with, by a config.json: its own or, where only padding's is named, that.

    ConfigError where neither is there, or it has no row in the embedding.
    """
    fields = Fields(config)
    last = fields.integer("vocab_size", most=2**26) - 1
    if fields.has("pad_token_id") and not fields.has("decoder_start_token_id"):
        return fields.integer("pad_token_id", least=0, most=last)
    return fields.integer("decoder_start_token_id", least=0, most=last)


class DecoderCache:
    """The keys and values of a decoder's layers: of the target in memory allocated once, of the source computed once.

    `memory` [B, S, D] is what the encoder gave, and of its row b source_lengths[b] positions are no padding. The
    source's keys and values are made when a layer first asks for them, which is when its weights are there.
    """

    def __init__(
        self, memory: Tensor, source_lengths: Tensor, *, layers: int, heads: int, head_dim: int, capacity: int
    ) -> None:
        self.memory, self.source_lengths = memory, source_lengths
        self.stored = memory.new_empty((2, layers, memory.shape[0], heads, capacity, head_dim))
        self.length = 0
        self._of_source: dict[int, KeysAndValues] = {}

    @property
    def capacity(self) -> int:
        """Target tokens that there is room for."""
        return self.stored.shape[4]

    def of_target(self, layer: int, keys: Tensor, values: Tensor) -> KeysAndValues:
        """Store those of T tokens, [B, H, T, head_dim] each, and give all that are stored.

        ValueError where there is no room for them.
        """
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} target tokens; {end} were to be stored.")
        of_layer = self.stored[:, layer, :, :, :end]
        of_layer[0, :, :, self.length :], of_layer[1, :, :, self.length :] = keys, values
        return of_layer[0], of_layer[1]

    def of_source(self, layer: int, make: Callable[[Tensor], KeysAndValues]) -> KeysAndValues:
        """Those of the source, [B, H, S, head_dim] each, which `make` computes from the memory the first time."""
        if layer not in self._of_source:
            self._of_source[layer] = make(self.memory)
        return self._of_source[layer]

    def advance(self, tokens: int) -> None:
        """Count target tokens as stored, after every layer has stored them."""
        self.length += tokens

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] holds, int64 [B]."""
        filled = self.stored[..., : self.length, :]
        filled.copy_(filled.index_select(2, rows))
        self.memory, self.source_lengths = (part.index_select(0, rows) for part in (self.memory, self.source_lengths))
        for layer, (keys, values) in self._of_source.items():
            self._of_source[layer] = keys.index_select(0, rows), values.index_select(0, rows)
