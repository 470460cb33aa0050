"""Beam search: the best of the texts that are followed side by side, for either kind of model."""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_pipe.artifacts import open_model
from qlora_pipe.cli import execute
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import NonFiniteError, UsageProblem
from qlora_pipe.generate import generate, generate_seq2seq, stream_text
from qlora_pipe.generate.beams import search
from qlora_pipe.nn.cache import KVCache
from qlora_pipe.nn.decoder import DecoderModel
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.stages.load import load
from qlora_pipe.testing import filled, tiny_checkpoint, tiny_weights
from qlora_plugins.llama import register_architectures
from tests.pipe.toy_seq2seq import Sizes, ToySeq2Seq

SOURCE = [3, 2, 4, 1]
PROMPT = [1, 4, 2]


def tiny_llama(*, seed: int = 5, **overrides: Any) -> DecoderModel:
    config = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 31,
        "max_position_embeddings": 64,
        **overrides,
    }
    model = filled(register_architectures()[0], config, tiny_weights(config, seed=seed), dtype=torch.float64)
    assert isinstance(model, DecoderModel)
    return model


def after_source(model: ToySeq2Seq, texts: Sequence[Sequence[int]]) -> Tensor:
    """What an encoder-decoder model says after each text, read at once: [B, V]."""
    lengths = torch.full((len(texts),), len(SOURCE))
    memory = model.encode(torch.tensor([SOURCE] * len(texts)), lengths)
    cache = model.new_cache(memory, lengths, capacity=len(texts[0]) + 1)
    return model.head(model.decode(torch.tensor([[model.start_id, *text] for text in texts]), cache=cache))[:, -1]


def after_prompt(model: DecoderModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """The same of a causal model."""
    logits: Tensor = model(torch.tensor([[*PROMPT, *text] for text in texts]))[:, -1]
    return logits


class Rereading:
    """A reader that remembers nothing but the tokens, and reads all of them again."""

    def __init__(self, after: Callable[[Sequence[Sequence[int]]], Tensor]) -> None:
        self._after = after

    def begin(self, ids: Sequence[int], *, room: int, rows: int = 1) -> Tensor:
        self._texts: list[list[int]] = [[] for _ in range(rows)]
        return self._after(self._texts).float()

    def go_on(self, tokens: Tensor) -> Tensor:
        self._texts = [[*text, token] for text, token in zip(self._texts, tokens.tolist(), strict=True)]
        return self._after(self._texts).float()

    def reorder(self, rows: Tensor) -> None:
        self._texts = [self._texts[row] for row in rows.tolist()]


def best_of_all(
    after: Callable[[Sequence[Sequence[int]]], Tensor],
    *,
    vocabulary: int,
    room: int,
    length_penalty: float,
    stop_ids: Collection[int],
) -> list[int]:
    """The best text of at most `room` tokens, out of every one there is."""
    ended: list[tuple[float, list[int]]] = []
    going_on: list[tuple[float, list[int]]] = [(0.0, [])]
    for length in range(1, room + 1):
        steps = after([text for _, text in going_on]).double().log_softmax(-1)
        longer = [
            (before + float(step[token]), [*text, token])
            for (before, text), step in zip(going_on, steps, strict=True)
            for token in range(vocabulary)
        ]
        ended += [(score / length**length_penalty, text[:-1]) for score, text in longer if text[-1] in stop_ids]
        going_on = [(score, text) for score, text in longer if text[-1] not in stop_ids]
    return max(ended + [(score / room**length_penalty, text) for score, text in going_on])[1]


@pytest.mark.parametrize("length_penalty", [-1.5, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_as_many_beams_as_there_are_texts_find_the_best_one(seed: int, length_penalty: float) -> None:
    seq2seq, causal = ToySeq2Seq(Sizes(vocabulary=5), seed=seed), tiny_llama(seed=seed, vocab_size=5)
    settings: dict[str, Any] = {"stop_ids": {1}, "length_penalty": length_penalty}
    found = list(generate_seq2seq(seq2seq, SOURCE, max_new_tokens=3, beams=125, **settings))
    assert found == best_of_all(lambda texts: after_source(seq2seq, texts), vocabulary=5, room=3, **settings)
    found = list(generate(causal, PROMPT, max_new_tokens=3, beams=125, **settings))
    assert found == best_of_all(lambda texts: after_prompt(causal, texts), vocabulary=5, room=3, **settings)


@pytest.mark.parametrize("beams", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_beams_with_a_cache_give_the_text_of_those_without(seed: int, beams: int) -> None:
    settings: dict[str, Any] = {"beams": beams, "length_penalty": 1.0, "stop_ids": {1, 6}}
    seq2seq, causal = ToySeq2Seq(seed=seed), tiny_llama(seed=seed)
    reader = Rereading(lambda texts: after_source(seq2seq, texts))
    expected = list(search(reader, [0], room=20, **settings))
    assert list(generate_seq2seq(seq2seq, SOURCE, max_new_tokens=20, **settings)) == expected
    reader = Rereading(lambda texts: after_prompt(causal, texts))
    expected = list(search(reader, PROMPT, room=20, **settings))
    assert list(generate(causal, PROMPT, max_new_tokens=20, **settings)) == expected


def test_more_beams_find_a_text_that_is_at_least_as_likely() -> None:
    model = tiny_llama()

    def log_probability(beams: int) -> float:
        text = list(generate(model, PROMPT, max_new_tokens=12, stop_ids=(), beams=beams))
        assert len(text) == 12
        steps = model(torch.tensor([[*PROMPT, *text]]))[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        return float(steps.gather(1, torch.tensor(text)[:, None]).sum())

    assert log_probability(1) < log_probability(4) <= log_probability(40)


def after_each(*logits: Sequence[float]) -> Rereading:
    """A model that says logits[t] after the token t, and logits[0] at first."""
    table = torch.tensor(logits)
    return Rereading(lambda texts: table[[text[-1] if text else 0 for text in texts]])


def found_by(reader: Rereading, *, room: int = 4, beams: int = 3, stop_ids: Collection[int] = ()) -> list[int]:
    return list(search(reader, [0], room=room, beams=beams, length_penalty=1.0, stop_ids=stop_ids))


def test_where_all_is_equal_the_first_beam_and_the_smallest_ids_win() -> None:
    assert found_by(after_each(*[[0.5] * 4] * 4)) == [0, 0, 0, 0]
    # The stop is as likely as the rest, and a short text as a long one: what ended first stays.
    assert found_by(after_each(*[[0.5] * 4] * 4), stop_ids={2}, room=2) == []


def test_only_ids_to_stop_at_give_an_empty_text() -> None:
    assert found_by(after_each(*[[0.0, 2.0, 1.0]] * 3), stop_ids={0, 1, 2}) == []


def test_fewer_ways_to_go_on_than_beams_are_enough() -> None:
    never = -math.inf
    only_one = after_each([never, 0.0, never], [never, never, 0.0], [0.0, never, never])
    assert found_by(only_one, room=5, beams=7) == [1, 2, 0, 1, 2]
    # Two ways on, one of which ends at once.
    assert found_by(after_each([never, 0.0, 1.0], [never, 0.0, never], [0.0] * 3), stop_ids={2}, room=2) == []


def test_a_row_that_nothing_was_left_for_takes_no_beam_from_others() -> None:
    never = -math.inf
    # One way at first. Then the best text begins with the least likely of three tokens.
    branches = [never, 0.0, -0.5, -1.0]
    reader = after_each([never, 0.0, never, never], branches, branches, [never, never, never, 0.0])
    assert found_by(reader, room=6) == [1, 3, 3, 3, 3, 3]


def test_a_likely_stop_takes_no_beam_from_those_that_go_on() -> None:
    reader = after_each([2.0, 1.9, 1.8, -9.0], [0.0] * 4, [-9.0, -9.0, 5.0, -9.0])
    assert found_by(reader, room=3, beams=2, stop_ids={0}) == [2, 2, 2]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_one_beam_whose_logits_are_not_finite_is_an_error(broken: float) -> None:
    reader = after_each([0.0, 1.0, -9.0], [-9.0, 0.0, -0.5], [0.0, broken, 0.0])
    with pytest.raises(NonFiniteError, match="at position 3:"):
        found_by(reader, beams=2)


def test_the_context_ends_a_search_too() -> None:
    model = tiny_llama(max_position_embeddings=20)
    assert len(list(generate(model, PROMPT, max_new_tokens=500, stop_ids=(), beams=3))) == 20 - len(PROMPT)


def test_drawing_and_searching_at_once_is_refused() -> None:
    said = "beams is 3 and temperature 0.7: .* set temperature to 0 or beams to 1"
    with pytest.raises(UsageProblem, match=said):
        generate(tiny_llama(), PROMPT, max_new_tokens=5, stop_ids=(), beams=3, temperature=0.7)
    with pytest.raises(UsageProblem, match=said):
        generate_seq2seq(ToySeq2Seq(), SOURCE, max_new_tokens=5, stop_ids=(), beams=3, temperature=0.7)


def test_the_command_prints_the_text_that_was_found_and_refuses_what_contradicts_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    command = ["generate", str(folder), "--prompt", "a fox", "--max-new-tokens", "9", "--beams", "4"]
    assert execute([*command, "--length-penalty", "0.5"]) == 0
    base = open_model(folder)
    loaded = load(base, find_architecture(load_plugins(), "llama"), dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = Tokenizer.open(folder)
    prompt = [1, *tokenizer.encode("a fox")[0]]
    expected = generate(loaded.causal, prompt, max_new_tokens=9, stop_ids={2}, beams=4, length_penalty=0.5)
    assert capsys.readouterr().out == "".join(stream_text(tokenizer, expected, prompt=prompt)) + "\n"
    assert execute([*command, "--temperature", "0.7"]) == 2
    assert "beams is 4 and temperature 0.7" in capsys.readouterr().err


@pytest.mark.parametrize(("beams", "length_penalty"), [(0, 1.0), (2, math.nan), (2, math.inf), (2, 11.0)])
def test_settings_of_no_meaning_are_refused(beams: int, length_penalty: float) -> None:
    with pytest.raises(ValueError, match="beams must be at least 1"):
        generate(tiny_llama(), PROMPT, max_new_tokens=5, stop_ids=(), beams=beams, length_penalty=length_penalty)


def test_a_caches_rows_go_on_from_any_of_them_and_keep_their_room() -> None:
    cache = KVCache(
        layers=2, batch=2, kv_heads=1, capacity=5, head_dim=2, dtype=torch.float32, device=torch.device("cpu")
    )
    cache.stored.copy_(torch.randn(cache.stored.shape, generator=torch.Generator().manual_seed(0)))
    cache.length = 3
    before = cache.stored.clone()
    for rows in ([1, 1], [0, 1, 1, 0, 0]):
        cache.reorder(torch.tensor(rows))
        before = before[:, :, rows]
        assert torch.equal(cache.stored[..., :3, :], before[..., :3, :])
        # Views of what is stored; the room behind the filled positions may hold anything, NaN too.
        for view, part in ((cache.keys[1], cache.stored[0, 1]), (cache.values[0], cache.stored[1, 0])):
            assert (view.data_ptr(), view.shape, view.stride()) == (part.data_ptr(), part.shape, part.stride())
        assert cache.stored.shape == (2, 2, len(rows), 1, 5, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(
    "settings", [{"beams": 4, "length_penalty": 0.5}, {"temperature": 0.8, "seed": 3}, {}], ids=str
)
def test_a_gpu_finds_the_texts_of_a_cpu(settings: dict[str, Any]) -> None:
    for seed in range(3):
        seq2seq, causal = ToySeq2Seq(seed=seed), tiny_llama(seed=seed)
        texts = [
            [
                list(generate_seq2seq(seq2seq.to(device), SOURCE, max_new_tokens=20, stop_ids={1}, **settings)),
                list(generate(causal.to(device), PROMPT, max_new_tokens=20, stop_ids={1}, **settings)),
            ]
            for device in ("cpu", "cuda")
        ]
        assert texts[0] == texts[1]
