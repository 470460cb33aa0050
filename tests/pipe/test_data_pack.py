"""Which samples share a row."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_pipe.data.pack import pack, pack_epoch
from qlora_pipe.data.samples import load_samples
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.plugins import load_plugins
from tests.pipe.encoders import encoder_of

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=80)


@given(lengths=LENGTHS)
def test_packing_puts_each_sample_into_the_fullest_row_that_has_room(lengths: list[int]) -> None:
    room: list[int] = []
    expected: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        fitting = [(left, row) for row, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            row = min(fitting)[1]
        else:
            row = len(room)
            room.append(23)
            expected.append([])
        room[row] -= lengths[index]
        expected[row].append(index)
    assert list(pack(range(len(lengths)), lengths, capacity=23)) == expected


@given(lengths=LENGTHS, seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_sample_once_and_no_row_too_many_tokens(lengths: list[int], seed: int, epoch: int) -> None:
    rows = list(pack_epoch(lengths, capacity=20, seed=seed, epoch=epoch))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= 20 for row in rows)
    assert list(pack_epoch(lengths, capacity=20, seed=seed, epoch=epoch)) == rows


def test_samples_meet_others_in_every_epoch_and_come_in_another_order() -> None:
    lengths = [1 + number * 7 % 19 for number in range(3000)]
    epochs = [pack_epoch(lengths, capacity=40, seed=1, epoch=epoch) for epoch in range(3)]
    together = [{frozenset(row) for row in rows} for rows in epochs]
    assert len(together[0] & together[1]) < 0.1 * len(together[0])
    # Rows come in no order of their lengths: the first third is as full of long samples as the last.
    for rows in epochs:
        longest = [max(lengths[index] for index in row) for row in rows]
        third = len(rows) // 3
        assert sum(longest[:third]) == pytest.approx(sum(longest[-third:]), rel=0.1)
    # Runs are continued by later versions; these rows must not move.
    assert epochs[0][:2] == [[1332, 1617, 1524], [377, 681, 2655]]


def test_more_than_97_of_100_places_are_filled_on_real_lengths(shared_data: Path) -> None:
    tokenizer = Tokenizer.open(shared_data / "tokenizers/mistral")
    source = shared_data / "datasets/alpaca/alpaca_schema_from_seed_tasks_175.json"
    encoder = encoder_of(tokenizer, max_tokens=10_000)
    samples = load_samples(f"alpaca:{source}", encoder=encoder, manager=load_plugins()).samples
    assert len(samples) == len(json.loads(source.read_text()))
    lengths = [min(len(sample.ids), 512) - 1 for sample in samples]
    for epoch in range(3):
        rows = pack_epoch(lengths, capacity=512, seed=0, epoch=epoch)
        assert sum(lengths) > 0.97 * 512 * len(rows)
