"""Batches of samples: the endless stream to train on, which any position gives again, and a fixed pass to evaluate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_pipe.data.encode import Sample
from qlora_pipe.data.order import epoch_order

IGNORE = -100
"""The label of a position that is not trained."""

PAD_ID = 0
"""Stands after a sample's end. No model or loss looks for it: its label is IGNORE, and it comes last."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Samples side by side, padded on the right."""

    ids: Tensor
    """[B, T], int64: what the model reads."""
    labels: Tensor
    """[B, T], int64: labels[b, t] is the id that should follow ids[b, :t + 1], or IGNORE."""
    tokens: int
    """Ids that are no padding."""
    trained: int
    """Labels that are not IGNORE."""
    origins: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """A place in the stream over `samples` samples."""

    position: int
    """Samples taken so far, over all epochs."""
    samples: int

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.position // self.samples

    @property
    def index(self) -> int:
        """Samples taken of the epoch that has begun."""
        return self.position % self.samples

    def advanced(self, count: int) -> "Cursor":
        """Give the place `count` samples on."""
        return Cursor(position=self.position + count, samples=self.samples)


def stream_index(position: int, *, samples: int, seed: int) -> int:
    """Say which of the samples stands at a position of the stream: each epoch visits every one, in its own order."""
    cursor = Cursor(position=position, samples=samples)
    return int(epoch_order(samples, seed=seed, epoch=cursor.epoch)[cursor.index])


def batch_at(samples: Sequence[Sample], *, seed: int, position: int, batch_size: int) -> Batch:
    """Give the batch that begins at a position of the stream; a pure function of its arguments."""
    positions = range(position, position + batch_size)
    return collate([samples[stream_index(at, samples=len(samples), seed=seed)] for at in positions])


def eval_batches(samples: Sequence[Sample], *, batch_size: int) -> Iterator[Batch]:
    """Yield every sample once, the longest first, so that little is padded and memory peaks at the start."""
    ordered = sorted(samples, key=lambda sample: -len(sample.ids))
    for start in range(0, len(ordered), batch_size):
        yield collate(ordered[start : start + batch_size])


def collate(samples: Sequence[Sample]) -> Batch:
    """Set samples side by side: the model reads all ids but the last, and its labels are those one place on."""
    lengths = [len(sample.ids) - 1 for sample in samples]
    ids = torch.full((len(samples), max(lengths)), PAD_ID, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        sequence = torch.from_numpy(sample.ids).long()
        ids[row, :length] = sequence[:-1]
        labels[row, :length] = sequence[1:].where(torch.from_numpy(sample.trained)[1:], IGNORE)
    return Batch(
        ids=ids,
        labels=labels,
        tokens=sum(lengths),
        trained=sum(int(sample.trained.sum()) for sample in samples),
        origins=tuple(sample.origin for sample in samples),
    )
