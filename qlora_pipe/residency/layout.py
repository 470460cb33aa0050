"""Lay a model's tensors out where they are to live, and bring them there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from qlora_pipe.lanes import Mark, lane_on
from qlora_pipe.residency.choice import AtRest, Lives
from qlora_pipe.residency.feeder import Feeder, Sending
from qlora_pipe.residency.image import Image, Part
from qlora_pipe.residency.pinned import read_images
from qlora_pipe.residency.ring import Coming, Ring

# One block computes while the next one comes.
SLOTS = 2


class Placed(NamedTuple):
    """A tensor of a model, the block that it belongs to, if any, and whether our kernels alone read it."""

    part: Part
    block: str | None
    packed: bool = False


class Layout(ABC):
    """Tensors on their way to where they will live; `tensor` gives them before they are there.

    A context: at its end all is there, and after an error nothing more is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lane = lane_on(device)
        self._feeder = Feeder(self._lane, device)
        self._sent: list[Sending] = []
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the file, in the type that was asked for. Its values come with the context's end."""
        return self._tensors[name]

    def settle(self, parts: Sequence[Part]) -> None:
        """Give tensors a buffer of their own on the device, and begin to bring them."""
        image = Image.of(parts)
        buffer = torch.empty(image.n_bytes, dtype=torch.uint8, device=self.device)
        # Its memory may be another's whose last use the device has not come to.
        self._sent.append(self._feeder.send(image, buffer, after=self._lane.here()))
        self.know(parts, image.views(buffer))

    def know(self, parts: Iterable[Part], views: dict[str, Tensor]) -> None:
        """Note where tensors are, or will be; one without elements is anywhere."""
        self._tensors |= views
        for part in parts:
            if not part.n_bytes:
                self._tensors[part.name] = torch.empty(part.shape, dtype=part.dtype, device=self.device)

    def lay_blocks(self, blocks: Mapping[str, nn.Module]) -> None:  # noqa: B027
        """Lay out what waits for the model's blocks, by their paths in the order in which they run."""

    @abstractmethod
    def lives(self) -> Lives:
        """What the model asks from now on, with hooks on its blocks where they have to say that their turn has come."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _fault: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                for sending in self._sent:
                    sending.finish()
        finally:
            self._feeder.close()


class ResidentLayout(Layout):
    """All tensors on the device: those of a block, and those of none, in one buffer each."""

    def __init__(self, placed: Sequence[Placed], *, device: torch.device) -> None:
        super().__init__(device)
        for parts in by_block(placed).values():
            self.settle(parts)

    def lives(self) -> Lives:
        """Nothing moves any more."""
        return AtRest("resident")


class StreamedLayout(Layout):
    """The tensors of blocks in a few slots on the device that all blocks pass through; the others stay there.

    The blocks come from images in host memory that the driver holds, as many as `room` bytes take, and the others from
    the files, each time. `note` is told of those.
    """

    def __init__(
        self,
        placed: Sequence[Placed],
        *,
        device: torch.device,
        room: int = 0,
        slots: int = SLOTS,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(device)
        self._placed = placed
        self._room = room
        self._n_slots = slots
        self._note = note
        self._blocks: list[nn.Module] = []
        self._images: list[Image] = []
        self._slots: list[Tensor] = []

    def lay_blocks(self, blocks: Mapping[str, nn.Module]) -> None:
        """Block i gets slot i modulo the slots."""
        self._blocks = list(blocks.values())
        waiting = by_block(self._placed)
        of_blocks = [waiting.pop(path, []) for path in blocks]
        self.settle([part for parts in waiting.values() for part in parts])
        self._images = [Image.of(parts) for parts in of_blocks]
        size = max((image.n_bytes for image in self._images), default=0)
        n_slots = min(self._n_slots, len(of_blocks))
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(n_slots)]
        for number, (parts, image) in enumerate(zip(of_blocks, self._images, strict=True)):
            self.know(parts, image.views(self._slots[number % n_slots]))

    def lives(self) -> Ring:
        """A ring that every block enters before its forward pass."""
        ring = streaming(self._images, self._slots, device=self.device, room=self._room, note=self._note)
        for number, block in enumerate(self._blocks):
            block.register_forward_pre_hook(_entering(ring, number))
        return ring


def by_block(placed: Iterable[Placed]) -> dict[str | None, list[Part]]:
    """The tensors of each block, and under None those of no block."""
    found: dict[str | None, list[Part]] = {}
    for part, block, _ in placed:
        found.setdefault(block, []).append(part)
    return found


def streaming(
    images: Sequence[Image],
    slots: Sequence[Tensor],
    *,
    device: torch.device,
    room: int,
    note: Callable[[str], None] = lambda _: None,
) -> Ring:
    """Let images pass through slots, uint8 on the device: from host memory as far as `room` bytes go."""
    lane = lane_on(device)
    held = read_images(images, room=room)
    feeder = Feeder(lane, device) if None in held else None
    if feeder is not None and device.type == "cuda":
        note(
            f"{held.count(None)} of {len(images)} blocks found no room in host memory that the GPU copies from; they"
            " are read from the disk each time."
        )

    def send(number: int, slot: Tensor, after: Mark | None) -> Coming:
        image, source = images[number], held[number]
        if source is not None:
            return lane.copy(slot[: image.n_bytes], source.bytes, after=after)
        assert feeder is not None
        return feeder.send(image, slot, after=after)

    return Ring(sizes=[image.n_bytes for image in images], slots=slots, send=send, lane=lane, held=held)


def _entering(ring: Ring, number: int) -> Callable[[nn.Module, object], None]:
    def enter(block: nn.Module, _: object) -> None:
        # Nobody goes back through a model that is not in training.
        ring.enter(number, around=not block.training)

    return enter
