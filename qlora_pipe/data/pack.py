"""Which samples share a row of a batch: best fit decreasing (Johnson, 1973), a pure function of what it is given."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence

from qlora_pipe.data.order import epoch_order, row_order

# Samples are packed by so many rows' worth of them at a time, in the order in which the epoch would visit them: enough
# to fill rows well, and few enough that samples go on meeting others in each epoch.
_WINDOW = 256


def pack_epoch(lengths: Sequence[int], *, capacity: int, seed: int, epoch: int) -> list[list[int]]:
    """Give the rows of one epoch in their order: each a list of indices into `lengths` of at most `capacity` tokens.

    Every sample stands in one row; none may be longer than a row.
    """
    order: list[int] = epoch_order(len(lengths), seed=seed, epoch=epoch).tolist()
    rows = [row for window in _windows(order, lengths, capacity) for row in pack(window, lengths, capacity=capacity)]
    return [rows[number] for number in row_order(len(rows), seed=seed, epoch=epoch)]


def pack(indices: Iterable[int], lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Put the samples of these indices, the longest first, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    # The room left in each row and the row's number, in rising order; full rows are left out.
    room: list[tuple[int, int]] = []
    for index in sorted(indices, key=lambda each: -lengths[each]):
        length = lengths[index]
        assert length <= capacity, "a sample is never longer than a row"
        place = bisect_left(room, (length, 0))
        left, number = room.pop(place) if place < len(room) else (capacity, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(index)
        if left > length:
            insort(room, (left - length, number))
    return rows


def _windows(order: Sequence[int], lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    window: list[int] = []
    tokens = 0
    for index in order:
        window.append(index)
        tokens += lengths[index]
        if tokens >= _WINDOW * capacity:
            yield window
            window, tokens = [], 0
    if window:
        yield window
