"""Samples on disk or in memory, in a few bytes of memory each: one file of records, and one that says where they end.

A record is the ids (int32), the ids of the source (int32), a byte for each id that is 1 where it is trained, one more
that is 1 where the sample was cut, and the origin in UTF-8, side by side, little-endian. The index has for each record
where it ends in the file (int64) and how many ids and ids of the source it has (uint32 each): 16 bytes a sample, which
are held in memory. Records are read when they are asked for, and not mapped: a file that is shortened meanwhile is an
error and does not kill the process, and what was read is not counted as this process' memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from qlora_pipe.data.encode import Sample

RECORDS = "records.bin"
INDEX = "index.bin"

INDEX_TYPE = np.dtype([("end", "<i8"), ("ids", "<u4"), ("source", "<u4")])


class Sink(Protocol):
    """Where bytes are appended."""

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`."""


class Records(Protocol):
    """Where bytes are read from."""

    def read_into(self, buffer: memoryview, *, start: int) -> None:
        """Fill `buffer` from the byte `start` on."""


class InMemory:
    """Bytes that are written and read without a file."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`."""
        self._data += data

    def read_into(self, buffer: memoryview, *, start: int) -> None:
        """Fill `buffer` from the byte `start` on."""
        buffer[:] = self._data[start : start + len(buffer)]

    def __bytes__(self) -> bytes:
        return bytes(self._data)


class SampleSequence(Sequence[Sample]):
    """Samples by their index, and their lengths without a look at them."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many ids each sample has, [n]."""
        raise NotImplementedError

    @property
    def source_lengths(self) -> NDArray[np.int64]:
        """How many ids each sample's source has, [n]."""
        raise NotImplementedError

    def _sample(self, index: int) -> Sample:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "ChosenSamples": ...
    def __getitem__(self, index: int | slice) -> "Sample | ChosenSamples":
        if isinstance(index, slice):
            return ChosenSamples(self, np.arange(len(self))[index])
        return self._sample(range(len(self))[index])


class ChosenSamples(SampleSequence):
    """Some of other samples, by their indices [n]."""

    def __init__(self, samples: Sequence[Sample], indices: NDArray[np.int64]) -> None:
        self._samples, self._indices = samples, indices

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return lengths_of(self._samples)[self._indices]

    @property
    def source_lengths(self) -> NDArray[np.int64]:
        return source_lengths_of(self._samples)[self._indices]

    def _sample(self, index: int) -> Sample:
        return self._samples[int(self._indices[index])]


class StoredSamples(SampleSequence):
    """The samples of a file of records."""

    def __init__(self, records: Records, index: NDArray[Any]) -> None:
        self._records, self._index = records, index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._index["ids"].astype(np.int64)

    @property
    def source_lengths(self) -> NDArray[np.int64]:
        return self._index["source"].astype(np.int64)

    def _sample(self, index: int) -> Sample:
        start = int(self._index["end"][index - 1]) if index else 0
        end, n_ids, n_source = (int(value) for value in self._index[index].tolist())
        record = bytearray(end - start)
        self._records.read_into(memoryview(record), start=start)
        flags = 4 * (n_ids + n_source)
        source = np.frombuffer(record, "<i4", n_source, 4 * n_ids).astype(np.int32, copy=False)
        return Sample(
            ids=np.frombuffer(record, "<i4", n_ids).astype(np.int32, copy=False),
            trained=np.frombuffer(record, np.bool_, n_ids, flags),
            origin=record[flags + n_ids + 1 :].decode(),
            # No source is empty: its end of text is always there.
            source=source if n_source else None,
            cut=bool(record[flags + n_ids]),
        )


class SampleWriter:
    """Appends samples to both files."""

    def __init__(self, records: Sink, index: Sink) -> None:
        self._records, self._index, self._end = records, index, 0

    def write(self, samples: Sequence[Sample]) -> None:
        """Append samples, each record in one piece."""
        index = np.empty(len(samples), INDEX_TYPE)
        pieces: list[bytes] = []
        for row, sample in enumerate(samples):
            record = b"".join(_parts(sample))
            self._end += len(record)
            index[row] = (self._end, len(sample.ids), 0 if sample.source is None else len(sample.source))
            pieces.append(record)
        self._records.write(b"".join(pieces))
        self._index.write(index.tobytes())


def _parts(sample: Sample) -> Iterator[bytes]:
    yield sample.ids.astype("<i4", copy=False).tobytes()
    if sample.source is not None:
        assert len(sample.source), "a source ends with an end of text, so it is never empty"
        yield sample.source.astype("<i4", copy=False).tobytes()
    yield sample.trained.astype(np.uint8, copy=False).tobytes()
    yield b"\1" if sample.cut else b"\0"
    yield sample.origin.encode()


def lengths_of(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """How many ids each of some samples has, [n]."""
    if isinstance(samples, SampleSequence):
        return samples.lengths
    return np.fromiter((len(sample.ids) for sample in samples), np.int64, len(samples))


def source_lengths_of(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """How many ids the source of each of some samples has, [n]; 0 where there is none."""
    if isinstance(samples, SampleSequence):
        return samples.source_lengths
    sources = (0 if sample.source is None else len(sample.source) for sample in samples)
    return np.fromiter(sources, np.int64, len(samples))


def largest_id(samples: Iterable[Sample]) -> int:
    """The largest id of some samples, in what is read and in sources; -1 of none."""
    parts = (part for sample in samples for part in (sample.ids, sample.source) if part is not None and len(part))
    return max((int(part.max()) for part in parts), default=-1)
