"""Images: the tensors of a block side by side as bytes, so that a block is one copy.

A store of ours has a block's tensors side by side, and then its image is a stretch of the file as it is. Of any other
folder, and where a tensor is computed in another type than it is stored in, the image is put together.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from qlora_formats.tensorfile import TensorFile

# In an image that is put together every tensor starts on a multiple of this: what a GPU's allocator gives.
_ALIGNMENT = 256
# A stretch of a file is used as it is where its tensors that are not small start on a multiple of what a GPU loads at
# once, and all of them on one of their elements.
_LOAD_BYTES = 16
_SMALL_BYTES = 4096
# How much of a stretch may be something else than tensors that are needed.
_WASTE = 1 / 64


class Part(NamedTuple):
    """A tensor in a file, and the type that it is wanted in."""

    name: str
    file: TensorFile
    dtype: torch.dtype

    @property
    def as_stored(self) -> bool:
        return self.file.infos[self.name].dtype == self.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.infos[self.name].shape

    @property
    def n_bytes(self) -> int:
        """Bytes in the image."""
        return prod(self.shape) * self.dtype.itemsize


class Stretch(NamedTuple):
    """Elements of a file, from the byte `start` on, that belong into an image at the byte `at`."""

    file: TensorFile
    start: int
    at: int
    elements: int
    stored: torch.dtype = torch.uint8
    wanted: torch.dtype = torch.uint8

    @property
    def n_bytes(self) -> int:
        """Bytes in the image."""
        return self.elements * self.wanted.itemsize

    def read(self, out: Tensor) -> None:
        """Fill `out`, uint8 [n_bytes] on the CPU; FormatError where the file has changed."""
        if self.stored == self.wanted:
            self.file.read_into(out.numpy().data, start=self.start)
            return
        raw = torch.empty(self.elements * self.stored.itemsize, dtype=torch.uint8)
        self.file.read_into(raw.numpy().data, start=self.start)
        out.view(self.wanted).copy_(raw.view(self.stored))

    def pieces(self, most_bytes: int) -> Iterator[Self]:
        """The same in pieces of at most so many bytes."""
        step = max(1, most_bytes // max(self.stored.itemsize, self.wanted.itemsize))
        for first in range(0, self.elements, step):
            yield self._replace(
                start=self.start + first * self.stored.itemsize,
                at=self.at + first * self.wanted.itemsize,
                elements=min(step, self.elements - first),
            )


class Image(NamedTuple):
    """Tensors side by side in `n_bytes` bytes: at which byte each begins, and where the bytes come from."""

    parts: Mapping[str, Part]
    places: Mapping[str, int]
    stretches: tuple[Stretch, ...]
    n_bytes: int

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Self:
        """Lay tensors side by side: those that are used as stored as they lie in their file, if that will do."""
        by_name = {part.name: part for part in parts if part.n_bytes}
        files: dict[int, list[Part]] = {}
        converted = []
        for part in by_name.values():
            if part.as_stored:
                files.setdefault(id(part.file), []).append(part)
            else:
                converted.append(part)
        places: dict[str, int] = {}
        stretches: list[Stretch] = []
        reached = 0
        for together in files.values():
            reached = _round_up(reached)
            if _side_by_side(together):
                file, first = together[0].file, min(part.file.infos[part.name].start for part in together)
                length = max(part.file.infos[part.name].end for part in together) - first
                places |= {part.name: reached + part.file.infos[part.name].start - first for part in together}
                stretches.append(Stretch(file, first, reached, length))
                reached += length
            else:
                converted += together
        for part in converted:
            reached = _round_up(reached)
            places[part.name] = reached
            info = part.file.infos[part.name]
            stretches.append(Stretch(part.file, info.start, reached, prod(info.shape), info.dtype, part.dtype))
            reached += part.n_bytes
        return cls(by_name, places, tuple(stretches), reached)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors by name, as views of a buffer uint8 [at least n_bytes] that the image lies in, or will."""
        return {
            name: buffer[at : at + self.parts[name].n_bytes].view(self.parts[name].dtype).view(self.parts[name].shape)
            for name, at in self.places.items()
        }

    @property
    def is_stretch(self) -> bool:
        """Whether the image is one stretch of a file as it is."""
        return len(self.stretches) == 1 and self.stretches[0].stored == torch.uint8

    def pieces(self, most_bytes: int) -> Iterator[Stretch]:
        """What makes up the image, in pieces of at most so many bytes."""
        for stretch in self.stretches:
            yield from stretch.pieces(most_bytes)


def _side_by_side(parts: list[Part]) -> bool:
    """Whether the tensors of one file may be used in the order and at the distances in which they lie there."""
    infos = [part.file.infos[part.name] for part in parts]
    first, end = min(info.start for info in infos), max(info.end for info in infos)
    needed = sum(info.end - info.start for info in infos)
    aligned = (
        (info.start - first) % (_LOAD_BYTES if info.end - info.start >= _SMALL_BYTES else info.dtype.itemsize) == 0
        for info in infos
    )
    return end - first - needed <= needed * _WASTE and all(aligned)


def _round_up(reached: int) -> int:
    return -(-reached // _ALIGNMENT) * _ALIGNMENT
