"""What every model is that maps a source to a target: an encoder that reads all of the one, a decoder for the other."""

import abc
from typing import Protocol

from torch import Tensor

from qlora_pipe.nn.language import LanguageModel


class Seq2SeqCache(Protocol):
    """What decoding remembers of its rows: keys and values of the source, and of the target as far as it is read."""

    length: int
    """Target tokens that are stored."""

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] holds, int64 [B]: which beams live on."""


class Seq2SeqModel(LanguageModel):
    """An encoder-decoder model."""

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
