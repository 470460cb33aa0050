"""Which samples share a row of a batch: best fit decreasing (Johnson, 1973), a pure function of what it is given."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qlora_pipe.data.order import epoch_order, row_order

# Samples are packed by so many rows' worth of them at a time, in the order in which the epoch would visit them: enough
# to fill rows well, and few enough that samples go on meeting others in each epoch.
_WINDOW = 256


class PackedRows(Sequence[list[int]]):
    """Rows of samples' indices, in 24 bytes a sample at most."""

    def __init__(self, indices: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        """Row r is indices[starts[r]] up to the start of the next in their order, [n] and [rows]."""
        self._indices, self._starts = indices, starts
        self._order: NDArray[np.int64] | None = None

    def reordered(self, order: NDArray[np.int64]) -> "PackedRows":
        """The same rows in another order."""
        rows = PackedRows(self._indices, self._starts)
        rows._order = order
        return rows

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...
    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[each] for each in range(len(self))[row]]
        number = range(len(self))[row] if self._order is None else int(self._order[row])
        end = self._starts[number + 1] if number + 1 < len(self._starts) else len(self._indices)
        found: list[int] = self._indices[self._starts[number] : end].tolist()
        return found


def pack_epoch(lengths: ArrayLike, *, capacity: int, seed: int, epoch: int) -> PackedRows:
    """Give the rows of one epoch in their order: each a list of indices into `lengths` of at most `capacity` tokens.

    Every sample stands in one row; none may be longer than a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = epoch_order(len(lengths), seed=seed, epoch=epoch)
    indices, starts = np.empty_like(order), np.empty_like(order)
    filled = rows = 0
    for window in _windows(order, lengths, capacity):
        packed, begins = _packed(window, lengths[window], capacity)
        starts[rows : rows + len(begins)] = begins + filled
        indices[filled : filled + len(packed)] = packed
        rows, filled = rows + len(begins), filled + len(packed)
    return PackedRows(indices, starts[:rows].copy()).reordered(row_order(rows, seed=seed, epoch=epoch))


def pack(indices: ArrayLike, lengths: ArrayLike, *, capacity: int) -> PackedRows:
    """Put the samples of these indices, the longest first, each into the fullest row that has room for it."""
    chosen = np.asarray(indices, dtype=np.int64)
    return PackedRows(*_packed(chosen, np.asarray(lengths, dtype=np.int64)[chosen], capacity))


def _packed(
    indices: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The indices row by row, and where each row begins among them."""
    longest_first = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(indices), np.int64)
    # The room left in each row and the row's number, in rising order; full rows are left out.
    room: list[tuple[int, int]] = []
    rows = 0
    for place, index in enumerate(longest_first):
        length = int(lengths[index])
        assert length <= capacity, "a sample is never longer than a row"
        fitting = bisect_left(room, (length, 0))
        if fitting < len(room):
            left, number = room.pop(fitting)
        else:
            left, number = capacity, rows
            rows += 1
        row_of[place] = number
        if left > length:
            insort(room, (left - length, number))
    by_row = np.argsort(row_of, kind="stable")
    starts = np.searchsorted(row_of[by_row], np.arange(rows))
    return indices[longest_first[by_row]], starts


def _windows(order: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> Iterator[NDArray[np.int64]]:
    """Cut an order into stretches that are the first to hold so many tokens; the last one may hold fewer."""
    reached = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        before = int(reached[start - 1]) if start else 0
        end = 1 + int(np.searchsorted(reached, before + _WINDOW * capacity))
        yield order[start:end]
        start = end
