"""Batches of samples: the endless stream to train on, which any position gives again, and a fixed pass to evaluate.

A row of a batch is one sample or, packed, several one after the other. For a seq2seq model a row has two sides: what
the encoder reads, and what the decoder does.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qlora_pipe.data.encode import Sample
from qlora_pipe.data.order import epoch_order
from qlora_pipe.data.pack import PackedRows, pack, pack_epoch
from qlora_pipe.data.sample_file import lengths_of, source_lengths_of
from qlora_pipe.lanes import sent
from qlora_pipe.nn.language import Inputs
from qlora_pipe.nn.packing import Packing

IGNORE = -100
"""The label of a position that is not trained."""

PAD_ID = 0
"""Stands after a row's end. No model or loss looks for it: its label is IGNORE, and it comes last."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Rows of samples, padded on the right."""

    ids: Tensor
    """[B, T], int64: what the model reads, or the decoder of a seq2seq model."""
    labels: Tensor
    """[B, T], int64: labels[b, t] is the id that should follow ids[b, t] in its sample, or IGNORE."""
    tokens: int
    """Ids that are no padding, those of the sources among them."""
    trained: int
    """Labels that are not IGNORE."""
    origins: tuple[str, ...]
    packing: Packing | None = None
    """Where samples begin, in rows that may hold several; None where each holds one."""
    source: Tensor | None = None
    """[B, S], int64: what the encoder of a seq2seq model reads."""
    source_lengths: Tensor | None = None
    """[B], int64: how many of a row of `source` are no padding."""

    def inputs_on(self, device: torch.device) -> Inputs:
        """What a model on a device reads of the batch."""
        source, lengths = (None if part is None else sent(part, device) for part in (self.source, self.source_lengths))
        packing = None if self.packing is None else self.packing.to(device)
        return Inputs(sent(self.ids, device), packing, source, lengths)


class Place(NamedTuple):
    """A place in the stream of rows."""

    epoch: int
    """Epochs that are complete."""
    row: int
    """Rows taken of the epoch that has begun."""


class Stream:
    """The endless sequence of rows to train on: each epoch has every sample once, in an order of its own.

    With `row_tokens` samples are packed into rows of at most so many tokens, which no sample may exceed; without, each
    is a row. What stands at a position follows from the samples' lengths, the seed and `row_tokens` alone.
    """

    def __init__(self, samples: Sequence[Sample], *, seed: int, row_tokens: int | None = None) -> None:
        self._samples, self._seed, self._row_tokens = samples, seed, row_tokens
        self._lengths = lengths_of(samples) - 1
        # Epochs need not have equally many rows: position at which each begins, as far as they are known.
        self._starts = [0]
        self._packed: dict[int, PackedRows] = {}

    def place(self, position: int) -> Place:
        """Say where in its epochs a position, in rows from the beginning of training, lies."""
        if self._row_tokens is None:
            return Place(*divmod(position, len(self._samples)))
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self._rows_of(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, position) - 1
        return Place(epoch, position - self._starts[epoch])

    def row(self, position: int) -> list[int]:
        """Give the indices of the samples in the row at a position."""
        epoch, row = self.place(position)
        if self._row_tokens is None:
            return [int(epoch_order(len(self._samples), seed=self._seed, epoch=epoch)[row])]
        return self._rows_of(epoch)[row]

    def batch(self, position: int, *, rows: int) -> Batch:
        """Give the batch of so many rows that begins at a position."""
        picked = [[self._samples[index] for index in self.row(at)] for at in range(position, position + rows)]
        return collate(picked, packed=self._row_tokens is not None)

    def _rows_of(self, epoch: int) -> PackedRows:
        assert self._row_tokens is not None
        if epoch not in self._packed:
            # A loop asks for the same epoch again and again, and for two at their border.
            self._packed = {each: rows for each, rows in self._packed.items() if each == epoch - 1}
            self._packed[epoch] = pack_epoch(self._lengths, capacity=self._row_tokens, seed=self._seed, epoch=epoch)
        return self._packed[epoch]


def eval_batches(samples: Sequence[Sample], *, batch_size: int, row_tokens: int | None = None) -> Iterator[Batch]:
    """Yield every sample once, the longest first, so that little is padded and memory peaks at the start.

    With `row_tokens` they are packed into rows of at most so many tokens; `batch_size` counts rows.
    """
    lengths = lengths_of(samples)
    longest_first = np.argsort(-lengths - source_lengths_of(samples), kind="stable")
    if row_tokens is None:
        rows = PackedRows(longest_first, np.arange(len(longest_first)))
    else:
        rows = pack(longest_first, lengths - 1, capacity=row_tokens)
    for start in range(0, len(rows), batch_size):
        picked = [[samples[index] for index in rows[at]] for at in range(start, min(start + batch_size, len(rows)))]
        yield collate(picked, packed=row_tokens is not None)


def collate(rows: Sequence[Sequence[Sample]], *, packed: bool = False) -> Batch:
    """Set samples in rows: the model reads all ids of each but the last, and its labels are those one place on.

    Sources are padded on the right, too; how long each is, and not an id, says what is padding.
    """
    assert packed or all(len(row) == 1 for row in rows), "only packed rows hold several samples"
    lengths = [[_inputs(sample) for sample in row] for row in rows]
    width = max(map(sum, lengths))
    ids = torch.full((len(rows), width), PAD_ID, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for row, samples in enumerate(rows):
        start = 0
        for sample in samples:
            end = start + _inputs(sample)
            sequence = torch.from_numpy(sample.ids).long()
            ids[row, start:end] = sequence[:-1]
            labels[row, start:end] = sequence[1:].where(torch.from_numpy(sample.trained)[1:], IGNORE)
            start = end
    source, source_lengths = _sources([sample for samples in rows for sample in samples])
    return Batch(
        ids=ids,
        labels=labels,
        tokens=sum(map(sum, lengths)) + sum(_source_length(sample) for samples in rows for sample in samples),
        trained=sum(int(sample.trained.sum()) for row in rows for sample in row),
        origins=tuple(sample.origin for row in rows for sample in row),
        packing=Packing.of(lengths, width=width) if packed else None,
        source=source,
        source_lengths=source_lengths,
    )


def _sources(samples: Sequence[Sample]) -> tuple[Tensor | None, Tensor | None]:
    """The sources of samples in rows [B, S], and how long each is [B]; None, twice, where they have none."""
    sources = [torch.from_numpy(sample.source).long() for sample in samples if sample.source is not None]
    if not sources:
        return None, None
    assert len(sources) == len(samples), "either all samples have a source or none has"
    rows = nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=PAD_ID)
    return rows, torch.tensor([len(source) for source in sources])


def _source_length(sample: Sample) -> int:
    return 0 if sample.source is None else len(sample.source)


def _inputs(sample: Sample) -> int:
    """How many of a sample's ids the model reads: the last is only a label."""
    return len(sample.ids) - 1
