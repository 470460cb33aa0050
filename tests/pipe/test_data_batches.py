"""The stream of rows and the batches cut from it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_pipe.data.batches import IGNORE, PAD_ID, Batch, Place, Stream, collate, eval_batches
from qlora_pipe.data.encode import Sample


def _sample(length: int, *, number: int = 0, prompt: int = 1) -> Sample:
    ids = np.arange(length, dtype=np.int32) + 10 * number
    trained = np.arange(length) >= prompt
    return Sample(ids=ids, trained=trained, origin=f"rows:{number}")


def _samples(count: int) -> list[Sample]:
    return [_sample(2 + number * 7 % 5, number=number) for number in range(count)]


def _collate(samples: list[Sample]) -> Batch:
    return collate([[sample] for sample in samples])


def test_labels_are_the_next_ids_where_trained_and_padding_is_ignored() -> None:
    batch = _collate([_sample(4, number=1, prompt=2), _sample(2, number=2)])
    assert batch.ids.tolist() == [[10, 11, 12], [20, PAD_ID, PAD_ID]]
    assert batch.labels.tolist() == [[IGNORE, 12, 13], [21, IGNORE, IGNORE]]
    assert (batch.ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (batch.tokens, batch.trained, batch.origins) == (4, 3, ("rows:1", "rows:2"))
    assert batch.packing is None


def test_id_zero_inside_a_sample_is_no_padding() -> None:
    sample = Sample(ids=np.zeros(3, dtype=np.int32), trained=np.array([False, True, True]), origin="rows:0")
    batch = _collate([sample])
    assert (batch.labels.tolist(), batch.tokens, batch.trained) == ([[0, 0]], 2, 2)


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=6), prompt=st.integers(1, 4))
def test_batch_agrees_with_a_loop_over_its_samples(lengths: list[int], prompt: int) -> None:
    samples = [_sample(length, number=number, prompt=prompt) for number, length in enumerate(lengths)]
    batch = _collate(samples)
    assert batch.ids.shape == batch.labels.shape == (len(samples), max(lengths) - 1)
    for row, sample in enumerate(samples):
        for column in range(max(lengths) - 1):
            inside = column < len(sample.ids) - 1
            assert batch.ids[row, column] == (sample.ids[column] if inside else PAD_ID)
            is_target = inside and sample.trained[column + 1]
            assert batch.labels[row, column] == (sample.ids[column + 1] if is_target else IGNORE)
    assert batch.trained == int((batch.labels != IGNORE).sum())
    assert batch.tokens == sum(lengths) - len(lengths)


def test_samples_of_a_packed_row_follow_each_other_and_none_is_the_label_of_another() -> None:
    rows = [[_sample(4, number=1, prompt=2), _sample(2, number=2)], [_sample(3, number=3)]]
    batch = collate(rows, packed=True)
    assert batch.ids.tolist() == [[10, 11, 12, 20], [30, 31, PAD_ID, PAD_ID]]
    assert batch.labels.tolist() == [[IGNORE, 12, 13, 21], [31, 32, IGNORE, IGNORE]]
    assert (batch.tokens, batch.trained, batch.origins) == (6, 5, ("rows:1", "rows:2", "rows:3"))
    assert batch.packing is not None
    assert batch.packing.lengths == ((3, 1, 0), (2, 2))
    assert batch.packing.positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert batch.packing.boundaries.tolist() == [0, 3, 4, 6, 8]
    assert batch.packing.longest == 3


@given(count=st.integers(1, 60), seed=st.integers(0, 2**70), epoch=st.integers(0, 5))
def test_every_epoch_visits_every_sample_once(count: int, seed: int, epoch: int) -> None:
    stream = Stream(_samples(count), seed=seed)
    visited = [stream.row(position) for position in range(epoch * count, (epoch + 1) * count)]
    assert sorted(visited) == [[index] for index in range(count)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        stream = Stream(_samples(40), seed=seed)
        return tuple(stream.row(epoch * 40 + place)[0] for place in range(40))

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25
    # Runs are continued by later versions; this order must not move.
    assert order(0, 0)[:8] == (7, 10, 35, 18, 4, 38, 11, 15)


def _equal(one: Batch, other: Batch) -> bool:
    return (
        one.origins == other.origins
        and torch.equal(one.ids, other.ids)
        and torch.equal(one.labels, other.labels)
        and (one.packing and one.packing.lengths) == (other.packing and other.packing.lengths)
    )


@pytest.mark.parametrize("row_tokens", [None, 9])
@pytest.mark.parametrize("rows", [1, 3, 7, 16])
def test_batches_at_any_position_are_windows_of_one_stream(rows: int, row_tokens: int | None) -> None:
    samples = _samples(7)
    stream = Stream(samples, seed=3, row_tokens=row_tokens)
    everything = [[samples[index] for index in stream.row(position)] for position in range(60)]
    for position in (40, 0, 1, 6, 13):
        expected = collate(everything[position : position + rows], packed=row_tokens is not None)
        assert _equal(stream.batch(position, rows=rows), expected)


@pytest.mark.parametrize("row_tokens", [None, 9])
def test_a_batch_depends_on_nothing_but_samples_seed_and_position(row_tokens: int | None) -> None:
    samples = _samples(11)
    first = Stream(samples, seed=1, row_tokens=row_tokens).batch(9, rows=4)
    torch.manual_seed(5)
    np.random.seed(5)
    again = Stream(samples, seed=1, row_tokens=row_tokens)
    for epoch in range(8):
        again.batch(11 * epoch, rows=4)
    assert _equal(again.batch(9, rows=4), first)
    assert not _equal(Stream(samples, seed=2, row_tokens=row_tokens).batch(9, rows=4), first)


def test_a_place_is_the_epochs_that_are_complete_and_the_rows_taken_of_the_next() -> None:
    stream = Stream(_samples(7), seed=0)
    assert [stream.place(position) for position in (0, 6, 7, 16)] == [(0, 0), (0, 6), (1, 0), (2, 2)]


def test_packed_epochs_begin_where_the_rows_of_those_before_end() -> None:
    # So many that which sample joins which depends on the order, and epochs differ in their number of rows.
    samples = [_sample(2 + number * 7 % 11 % 10, number=number) for number in range(1200)]
    stream = Stream(samples, seed=1, row_tokens=10)
    places = [stream.place(position) for position in range(2000)]
    assert places[0] == Place(0, 0)
    for before, after in itertools.pairwise(places):
        assert after in (Place(before.epoch, before.row + 1), Place(before.epoch + 1, 0))
    sizes = [sum(place.epoch == epoch for place in places) for epoch in range(3)]
    assert sizes == [611, 612, 613]
    for epoch in range(3):
        rows = [stream.row(position) for position, place in enumerate(places) if place.epoch == epoch]
        assert sorted(index for row in rows for index in row) == list(range(1200))
    # A run that goes on asks for a late place first.
    late = Stream(samples, seed=1, row_tokens=10)
    assert late.place(1999) == places[1999]
    assert late.row(1999) == stream.row(1999)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_evaluation_sees_every_sample_once_longest_first(batch_size: int) -> None:
    samples = _samples(11)
    batches = list(eval_batches(samples, batch_size=batch_size))
    assert sorted(origin for batch in batches for origin in batch.origins) == sorted(s.origin for s in samples)
    widths = [batch.ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert sum(batch.trained for batch in batches) == sum(int(sample.trained.sum()) for sample in samples)
    again = eval_batches(samples, batch_size=batch_size)
    assert all(_equal(one, other) for one, other in zip(batches, again, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_packed_evaluation_sees_every_sample_once_in_rows_that_fit(batch_size: int) -> None:
    samples = _samples(11)
    batches = list(eval_batches(samples, batch_size=batch_size, row_tokens=8))
    assert sorted(origin for batch in batches for origin in batch.origins) == sorted(s.origin for s in samples)
    assert sum(batch.trained for batch in batches) == sum(int(sample.trained.sum()) for sample in samples)
    assert max(batch.ids.shape[1] for batch in batches) <= 8
    # The model reads 31 tokens of them, in rows of 8.
    assert sum(len(batch.ids) for batch in batches) == 4
