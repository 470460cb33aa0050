"""The ways in which a model's weights live, what all of them are to the rest, and which one is taken."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

Way = Literal["resident", "streamed", "mapped"]

_GB = 1e9


class Lives(Protocol):
    """What training and generation ask of where the weights live."""

    @property
    def way(self) -> Way:
        """How they live."""

    @property
    def prefers_layer_major(self) -> bool:
        """Whether several batches had better go through a block before the next block begins."""

    def enter(self, number: int, *, around: bool = False) -> None:
        """Let what is computed from here on use the block of this number, until another one is entered.

        Each block calls it before its forward pass; who runs a block's backward pass calls it before that. `around`:
        after the last block the first one comes again.
        """


@dataclass(frozen=True)
class AtRest:
    """Weights that stay where they are: on the device, or in host memory that is read from there."""

    way: Way
    held: Sequence[object] = ()
    """What must live as long as the model."""
    prefers_layer_major: ClassVar[bool] = False

    def enter(self, number: int, *, around: bool = False) -> None:
        """As `Lives.enter`: there is nothing to do."""


def choose(*, weight_bytes: int, step_bytes: int, free_bytes: int) -> tuple[Way, str]:
    """Give the way for a GPU, and a sentence that says why.

    `weight_bytes` are what all weights take, `step_bytes` what the work on them takes besides, roughly.
    """
    sums = (
        f"the weights take {weight_bytes / _GB:.1f} GB and the work on them about {step_bytes / _GB:.1f} GB, of"
        f" {free_bytes / _GB:.1f} GB that are free on the GPU"
    )
    if weight_bytes + step_bytes <= free_bytes:
        return "resident", f"the weights stay on the GPU (--residency resident): {sums}."
    return "streamed", f"the weights pass through the GPU block by block (--residency streamed): {sums}."
