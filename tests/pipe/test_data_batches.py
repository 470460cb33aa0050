"""The stream of samples and the batches cut from it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_pipe.data.batches import IGNORE, PAD_ID, Batch, Cursor, batch_at, collate, eval_batches, stream_index
from qlora_pipe.data.encode import Sample


def _sample(length: int, *, number: int = 0, prompt: int = 1) -> Sample:
    ids = np.arange(length, dtype=np.int32) + 10 * number
    trained = np.arange(length) >= prompt
    return Sample(ids=ids, trained=trained, origin=f"rows:{number}")


def _samples(count: int) -> list[Sample]:
    return [_sample(2 + number * 7 % 5, number=number) for number in range(count)]


def test_labels_are_the_next_ids_where_trained_and_padding_is_ignored() -> None:
    batch = collate([_sample(4, number=1, prompt=2), _sample(2, number=2)])
    assert batch.ids.tolist() == [[10, 11, 12], [20, PAD_ID, PAD_ID]]
    assert batch.labels.tolist() == [[IGNORE, 12, 13], [21, IGNORE, IGNORE]]
    assert (batch.ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (batch.tokens, batch.trained, batch.origins) == (4, 3, ("rows:1", "rows:2"))


def test_id_zero_inside_a_sample_is_no_padding() -> None:
    sample = Sample(ids=np.zeros(3, dtype=np.int32), trained=np.array([False, True, True]), origin="rows:0")
    batch = collate([sample])
    assert (batch.labels.tolist(), batch.tokens, batch.trained) == ([[0, 0]], 2, 2)


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=6), prompt=st.integers(1, 4))
def test_batch_agrees_with_a_loop_over_its_samples(lengths: list[int], prompt: int) -> None:
    samples = [_sample(length, number=number, prompt=prompt) for number, length in enumerate(lengths)]
    batch = collate(samples)
    assert batch.ids.shape == batch.labels.shape == (len(samples), max(lengths) - 1)
    for row, sample in enumerate(samples):
        for column in range(max(lengths) - 1):
            inside = column < len(sample.ids) - 1
            assert batch.ids[row, column] == (sample.ids[column] if inside else PAD_ID)
            is_target = inside and sample.trained[column + 1]
            assert batch.labels[row, column] == (sample.ids[column + 1] if is_target else IGNORE)
    assert batch.trained == int((batch.labels != IGNORE).sum())
    assert batch.tokens == sum(lengths) - len(lengths)


@given(count=st.integers(1, 60), seed=st.integers(0, 2**70), epoch=st.integers(0, 5))
def test_every_epoch_visits_every_sample_once(count: int, seed: int, epoch: int) -> None:
    positions = range(epoch * count, (epoch + 1) * count)
    visited = [stream_index(position, samples=count, seed=seed) for position in positions]
    assert sorted(visited) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(stream_index(epoch * 40 + place, samples=40, seed=seed) for place in range(40))

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25
    # Runs are continued by later versions; this order must not move.
    assert order(0, 0)[:8] == (7, 10, 35, 18, 4, 38, 11, 15)


def _equal(one: Batch, other: Batch) -> bool:
    return one.origins == other.origins and torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_batches_at_any_position_are_windows_of_one_stream(batch_size: int) -> None:
    samples = _samples(7)
    stream = [samples[stream_index(position, samples=7, seed=3)] for position in range(60)]
    for position in (0, 1, 6, 13, 40):
        batch = batch_at(samples, seed=3, position=position, batch_size=batch_size)
        assert _equal(batch, collate(stream[position : position + batch_size]))


def test_batch_depends_on_nothing_but_its_arguments() -> None:
    samples = _samples(11)
    first = batch_at(samples, seed=1, position=9, batch_size=4)
    torch.manual_seed(5)
    np.random.seed(5)
    for epoch in range(8):
        batch_at(samples, seed=2, position=11 * epoch, batch_size=4)
    assert _equal(batch_at(samples, seed=1, position=9, batch_size=4), first)


def test_cursor_counts_epochs_and_the_samples_taken_of_the_last() -> None:
    cursor = Cursor(position=0, samples=7)
    assert (cursor.epoch, cursor.index) == (0, 0)
    cursor = cursor.advanced(6).advanced(10)
    assert (cursor.position, cursor.epoch, cursor.index) == (16, 2, 2)


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
