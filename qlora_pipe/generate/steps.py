"""What runs a model token by token, and the plain way of doing so."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qlora_pipe.errors import NonFiniteError
from qlora_pipe.generate.readers import CausalModel, CausalReader, Reader


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


class ReaderSteps:
    """Every step by itself, on any device and with weights that may move between steps."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    @property
    def logits(self) -> Tensor:
        """What comes next, float32 [vocabulary]."""
        return self._logits[0]

    def begin(self, ids: Sequence[int], *, room: int) -> None:
        """Read a text that up to `room` tokens will follow, and forget any other."""
        self._logits = self._reader.begin(ids, room=room)

    def go_on(self, token: int) -> None:
        """Read one more token."""
        self._logits = self._reader.go_on(torch.tensor([token], device=self._logits.device))

    def likeliest(self, count: int) -> Iterator[tuple[float, int]]:
        """Yield the likeliest token `count` times, each read before the next, where it was found."""
        for number in range(count):
            top, token = self._logits.max(-1)
            yield told(top, token)
            if number + 1 < count:
                self._logits = self._reader.go_on(token)


class EagerSteps(ReaderSteps):
    """The same for a causal model."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__(CausalReader(model))


def told(top: Tensor, token: Tensor) -> tuple[float, int]:
    """Bring a logit and an id, one number each, to the host: one copy, in a type that holds both exactly."""
    found, likeliest = torch.stack((top.double().view(()), token.double().view(()))).tolist()
    return found, int(likeliest)


def require_finite(finite: bool, position: int) -> None:
    """Raise NonFiniteError where the logits after so many tokens hold NaN or infinity."""
    if not finite:
        raise NonFiniteError(
            f"the model's logits hold NaN or infinity at position {position}: its weights or its adapter are"
            " damaged, or overflow in this data type; try --dtype float32."
        )
