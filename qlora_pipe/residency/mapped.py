"""Packed weights in host memory that the GPU reads from there: `--residency mapped`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_formats.tensorfile import TensorFile
from qlora_pipe.errors import ConfigError
from qlora_pipe.residency.choice import AtRest, Lives
from qlora_pipe.residency.image import Image, Part
from qlora_pipe.residency.layout import Layout, Placed, by_block
from qlora_pipe.residency.pinned import HeldMemory, hold_file, read_images


class MappedLayout(Layout):
    """Codes and scales in host memory, all else on the device.

    Where the driver takes them, the pages are the files' own in the system's cache; else they are copied, at most
    `room` bytes. ConfigError where the driver takes neither, or nothing is packed.
    """

    def __init__(self, placed: Sequence[Placed], *, device: torch.device, room: int) -> None:
        super().__init__(device)
        packed = [each for each in placed if each.packed]
        if not packed:
            raise ConfigError("--residency mapped is for weights in 4 bits, and this base has none: use streamed.")
        self.settle([each.part for each in placed if not each.packed])
        self._held: list[HeldMemory] = []
        refused = {file for file in {each.part.file for each in packed} if not self._hold_file(file, packed)}
        self._copy([each for each in packed if each.part.file in refused], room=room)

    def _hold_file(self, file: TensorFile, packed: Sequence[Placed]) -> bool:
        """Let the packed tensors of a file be views of its own pages; False where the driver does not hold these."""
        held = hold_file(file)
        if held is None:
            return False
        self._held.append(held)
        for part in (each.part for each in packed if each.part.file is file):
            self.know([part], {part.name: _view(held.bytes, part)})
        return True

    def _copy(self, packed: Sequence[Placed], *, room: int) -> None:
        blocks = list(by_block(packed).values())
        images = [Image.of(parts) for parts in blocks]
        for parts, image, held in zip(blocks, images, read_images(images, room=room), strict=True):
            if held is None:
                total = sum(image.n_bytes for image in images)
                raise ConfigError(
                    f"--residency mapped asks for {total / 1e9:.1f} GB of host memory that the GPU reads, and the"
                    " system does not give that much: use streamed."
                )
            self._held.append(held)
            self.know(parts, image.views(held.bytes))

    def lives(self) -> Lives:
        """Nothing moves; the memory is held for as long as the model lives."""
        return AtRest("mapped", held=self._held)


def _view(pages: Tensor, part: Part) -> Tensor:
    info = part.file.infos[part.name]
    return pages[info.start : info.end].view(info.dtype).view(info.shape)
