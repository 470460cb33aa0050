"""Span corruption: what is dropped, what stands in its place, and that nothing is lost."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from qlora_pipe.data.spans import Corrupted, corrupt, corrupted, sentinels_of, window_tokens
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import SPAN_CORRUPTION, Example, Message
from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.testing import byte_tokenizer, tiny_checkpoint
from tests.pipe.encoders import encoder_of, samples_of

EOS = 1
SENTINELS = tuple(range(32099, 31999, -1))


def dropped_from(window: Sequence[int], *, seed: int = 0, row: int = 0) -> Corrupted:
    return corrupt(np.array(window, dtype=np.int32), sentinels=SENTINELS, seed=seed, row=row)


def spans_of(target: Sequence[int], sentinels: Sequence[int] = SENTINELS) -> dict[int, list[int]]:
    """What a target says that each sentinel stands for; nothing for the last one."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in sentinels:
            assert token not in spans
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    return spans


def rebuilt(source: Sequence[int], target: Sequence[int], sentinels: Sequence[int] = SENTINELS) -> list[int]:
    """The window, out of the two that it became."""
    spans = spans_of(target, sentinels)
    return [token for found in source for token in spans.get(found, [found])]


WINDOWS = st.lists(st.integers(0, 31999), min_size=2, max_size=1900)


@settings(deadline=None)
@given(window=WINDOWS, seed=st.integers(0, 2**32 - 1), row=st.integers(0, 10**9))
def test_source_and_target_give_the_window_back(window: list[int], seed: int, row: int) -> None:
    source, target = dropped_from(window, seed=seed, row=row)
    assert rebuilt(source, target) == window


@settings(deadline=None)
@given(window=WINDOWS, seed=st.integers(0, 2**32 - 1))
def test_15_percent_are_dropped_in_spans_of_3_on_average_no_two_of_which_touch(window: list[int], seed: int) -> None:
    source, target = dropped_from(window, seed=seed)
    spans = spans_of(target)
    names = list(SENTINELS[: len(spans)])
    assert list(spans) == names, "sentinels stand in their order, the last one at the end"
    assert [token for token in source if token in SENTINELS] == names[:-1]
    *lengths, last = map(len, spans.values())
    assert last == 0
    assert min(lengths) > 0
    assert abs(sum(lengths) - 0.15 * len(window)) <= 0.5 + 1e-9 or (sum(lengths), len(lengths)) == (1, 1)
    assert abs(len(lengths) - sum(lengths) / 3) <= 0.5 or len(lengths) == 1
    assert all(not {one, other} <= set(SENTINELS) for one, other in pairwise(source))


def test_the_papers_own_example_has_75_tokens_of_500_dropped_in_25_spans() -> None:
    source, target = dropped_from(range(500))
    assert len(spans_of(target)) - 1 == 25
    assert len(target) == 75 + 25 + 1
    assert len(source) == 500 - 75 + 25


def test_the_shortest_windows_drop_one_token_and_keep_the_rest() -> None:
    found = {tuple(dropped_from([7, 8], seed=seed).source) for seed in range(20)}
    assert found == {(SENTINELS[0], 8), (7, SENTINELS[0])}


def test_what_is_dropped_is_the_same_wherever_it_is_drawn() -> None:
    # Written down once: other values would make a resumed run another one.
    source, target = dropped_from(range(100, 140), seed=3, row=2)
    assert source == [*range(100, 108), 32099, *range(109, 134), 32098, 139]
    assert target == [32099, 108, 32098, *range(134, 139), 32097]


def test_what_is_dropped_follows_from_the_tokens_the_seed_and_the_row() -> None:
    window = list(range(300))
    assert dropped_from(window, seed=1, row=2) == dropped_from(window, seed=1, row=2)
    others = [dropped_from(window, seed=2, row=2), dropped_from(window, seed=1, row=3), dropped_from([9, *window[1:]])]
    assert len({tuple(spans_of(each.target)[SENTINELS[0]]) for each in [*others, dropped_from(window)]}) > 1
    assert all(each != dropped_from(window, seed=1, row=2) for each in others)


def test_every_way_to_choose_spans_is_as_likely_as_any_other() -> None:
    # Of 7 tokens 1 is dropped, so there are 7 ways.
    places = Counter(dropped_from(range(7), seed=seed).source.index(SENTINELS[0]) for seed in range(7000))
    assert set(places) == set(range(7))
    assert all(abs(times - 1000) < 120 for times in places.values())
    # Of 33 tokens 5 are dropped in 2 spans: the first has 1 to 4 of them, and begins anywhere that leaves room.
    windows = [dropped_from(range(33), seed=seed) for seed in range(4000)]
    lengths = Counter(len(spans_of(target)[SENTINELS[0]]) for _, target in windows)
    assert set(lengths) == {1, 2, 3, 4}
    assert all(abs(times - 1000) < 120 for times in lengths.values())
    gaps = Counter(source.index(SENTINELS[0]) for source, _ in windows)
    # Of the 29 * 28 / 2 pairs of gaps, 28 - g begin with gap g.
    assert all(abs(gaps[gap] - 4000 * (28 - gap) / 406) < 60 for gap in range(28))


def test_windows_for_512_tokens_are_those_that_t5_was_trained_on() -> None:
    # 568 tokens become a source of 512 and a target of 114, EOS counted; our target has its last sentinel besides.
    assert window_tokens(max_tokens=512, sentinels=100) == 568
    source, target = dropped_from(range(568))
    assert (len(source) + 1, len(target) + 1) == (512, 114 + 1)


@pytest.mark.parametrize(("max_tokens", "sentinels"), [(5, 2), (16, 100), (512, 100), (512, 32), (4096, 100)])
def test_windows_are_as_long_as_fits_and_has_sentinels(max_tokens: int, sentinels: int) -> None:
    many = range(40000, 39000, -1)
    longest = window_tokens(max_tokens=max_tokens, sentinels=sentinels)
    for size, fits in ((longest, True), (longest + 1, False)):
        source, target = corrupt(np.arange(size, dtype=np.int32), sentinels=many, seed=0, row=0)
        # EOS follows both, and the decoder begins with an id of its own.
        short = max(len(source) + 1, len(target) + 2) <= max_tokens
        assert (short and len(spans_of(target, many)) <= sentinels) == fits


@settings(deadline=None)
@given(
    count=st.integers(2, 3000),
    max_tokens=st.sampled_from([5, 6, 31, 512, 2048]),
    sentinels=st.sampled_from([2, 3, 32, 100]),
)
def test_a_texts_windows_hold_every_token_once_and_are_of_one_length(
    count: int, max_tokens: int, sentinels: int
) -> None:
    names = SENTINELS[:sentinels]
    found = list(corrupted(range(2, count + 2), sentinels=names, eos_id=EOS, max_tokens=max_tokens))
    assert all(source[-1] == target[-1] == EOS for source, target in found)
    assert all(max(len(source), len(target) + 1) <= max_tokens for source, target in found)
    windows = [rebuilt(source[:-1], target[:-1], names) for source, target in found]
    assert [token for window in windows for token in window] == list(range(2, count + 2))
    lengths = [len(window) for window in windows]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= window_tokens(max_tokens=max_tokens, sentinels=sentinels)


def test_equal_windows_of_a_text_lose_other_tokens() -> None:
    longest = window_tokens(max_tokens=64, sentinels=100)
    first, second = corrupted([7, 8] * longest, sentinels=SENTINELS, eos_id=EOS, max_tokens=64)
    assert first != second


def test_what_cannot_be_corrupted_is_refused() -> None:
    with pytest.raises(DataError, match="less than two tokens"):
        next(corrupted([7], sentinels=SENTINELS, eos_id=EOS, max_tokens=64))
    with pytest.raises(DataError, match="stands for a dropped span"):
        next(corrupted([7, 32050, 8], sentinels=SENTINELS, eos_id=EOS, max_tokens=64))
    with pytest.raises(ConfigError, match=r"--max-tokens is 4, .* takes 5"):
        next(corrupted([7, 8], sentinels=SENTINELS, eos_id=EOS, max_tokens=4))


def with_tokens(folder: Path, *tokens: str) -> Tokenizer:
    tiny_checkpoint(folder)
    raw: RawTokenizer = byte_tokenizer()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    (folder / "tokenizer.json").write_text(raw.to_str())
    return Tokenizer.open(folder)


@pytest.mark.parametrize("name", ["<extra_id_{}>", "▁<extra_id_{}>"])
def test_sentinels_come_in_the_order_of_their_numbers(tmp_path: Path, name: str) -> None:
    tokenizer = with_tokens(tmp_path, *(name.format(number) for number in (2, 1, 0, 11)))
    assert sentinels_of(tokenizer) == (261, 260, 259)


@pytest.mark.parametrize("tokens", [(), ("<extra_id_0>",), ("<extra_id_1>", "<extra_id_2>")])
def test_a_tokenizer_without_sentinels_is_refused(tmp_path: Path, tokens: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="has no <extra_id_0> and <extra_id_1>"):
        sentinels_of(with_tokens(tmp_path, *tokens))


def test_real_sentinels_are_found_and_no_text_becomes_one(shared_data: Path) -> None:
    small = Tokenizer.open(shared_data / "models" / "t5-stories-280k")
    assert sentinels_of(small) == tuple(range(543, 511, -1))
    assert set(small.encode("One <extra_id_0> two <extra_id_31>.")[0]).isdisjoint(sentinels_of(small))
    raw = RawTokenizer.from_file(str(shared_data / "tokenizers" / "t5" / "tokenizer.json"))
    full = Tokenizer(bos_id=None, eos_id=1, vocab_size=32100, digest="", inner=raw)
    assert sentinels_of(full) == SENTINELS


def a_text(content: str) -> Example:
    return Example(messages=(Message(role="text", content=content),), origin="tale.txt", form=SPAN_CORRUPTION)


def test_a_text_becomes_samples_whose_sides_give_it_back(tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, *(f"<extra_id_{number}>" for number in range(30)))
    content = "Once upon a time there was a fox. " * 9
    samples = samples_of(a_text(content), encoder_of(tokenizer, max_tokens=100, kind="seq2seq", start_id=7))
    assert [sample.origin for sample in samples] == [
        f"tale.txt window {number}" for number in range(1, len(samples) + 1)
    ]
    assert len(samples) > 2
    found: list[int] = []
    for sample in samples:
        assert sample.source is not None
        source, ids = sample.source.tolist(), sample.ids.tolist()
        assert (ids[0], ids[-1], source[-1]) == (7, tokenizer.eos_id, tokenizer.eos_id)
        assert max(len(source), len(ids)) <= 100
        assert sample.trained.tolist() == [False, *[True] * (len(ids) - 1)]
        assert {array.dtype for array in (sample.ids, sample.source)} == {np.dtype("int32")}
        found += rebuilt(source[:-1], ids[1:-1], sentinels_of(tokenizer))
    assert tokenizer.decode(found) == content


def test_a_text_whose_spans_cannot_be_dropped_is_named(tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, "<extra_id_0>", "<extra_id_1>")
    with pytest.raises(DataError, match=r"^tale\.txt: the text has less than two tokens"):
        samples_of(a_text("x"), encoder_of(tokenizer, kind="seq2seq", start_id=7))
    with pytest.raises(DataError, match=r"^tale\.txt: span corruption is for encoder-decoder models"):
        samples_of(a_text("a fox"), encoder_of(tokenizer))
