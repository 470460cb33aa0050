"""What every language model is, whatever its kind: blocks one after the other, a last norm, a head."""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from qlora_pipe.nn.packing import Packing

State = Tensor | tuple[Tensor, ...]
"""What goes from block to block: [B, T, D], or several tensors where blocks hand on more than one.

All blocks of a model take and give as many. One that a block hands on as it is, is the same object.
"""


def tensors_of(state: State) -> tuple[Tensor, ...]:
    """A state's tensors, of which there may be one."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def state_of(tensors: Sequence[Tensor]) -> State:
    """The state of these tensors, as `tensors_of` gives them."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


class Inputs(NamedTuple):
    """What a model reads of a batch, on its device."""

    ids: Tensor
    """[B, T], int64; of a seq2seq model what its decoder reads."""
    packing: Packing | None = None
    """Where samples begin in rows that hold several."""
    source: Tensor | None = None
    """[B, S], int64: what the encoder of a seq2seq model reads, padded on the right."""
    source_lengths: Tensor | None = None
    """[B], int64: how many of a row of `source` are no padding."""


class LanguageModel(nn.Module, abc.ABC):
    """A language model, cut where training and memory need it cut.

    Training runs it block by block: it keeps the state before a block and recomputes the rest, and brings a block's
    weights in while the one before still computes. So all that is quantised or adapted lies in a block, but the head.
    """

    @property
    @abc.abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in the order they run. Each is called with the state and what `begin` gave besides."""

    @abc.abstractmethod
    def begin(self, inputs: Inputs) -> tuple[State, Any]:
        """Give the state before the first block, and what every block is told besides it.

        The second is one object, never changed by a block; positions, masks and the packing travel in it.
        """

    @abc.abstractmethod
    def finish(self, state: Any) -> Tensor:
        """The state after the last block -> the hidden states [B, T, D] that the head reads."""

    @abc.abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., vocabulary]."""

    @property
    def head_weight(self) -> Tensor | None:
        """The matrix [vocabulary, D] where the head is the product with it, frozen; then no logits are ever kept."""
        return None

    @property
    def head_softcap(self) -> float | None:
        """What the head makes of the product z with that matrix: softcap * tanh(z / softcap); None for z as it is."""
        return None

    def hidden_of(self, inputs: Inputs) -> Tensor:
        """Run everything but the head: the last hidden states [B, T, D]."""
        state, told = self.begin(inputs)
        for block in self.blocks:
            state = block(state, told)
        return self.finish(state)
