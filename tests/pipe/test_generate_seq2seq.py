"""Generation with an encoder-decoder model: what its decoder says of a source, token by token."""

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_pipe.architecture import Architecture
from qlora_pipe.config import GenerateConfig
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import DataError, NonFiniteError, UsageProblem
from qlora_pipe.generate import generate_seq2seq
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.stages.generate import answer
from qlora_pipe.testing import tiny_checkpoint
from tests.pipe.toy_seq2seq import Sizes, ToySeq2Seq

SOURCE = [5, 17, 4, 20, 1]


def given(model: ToySeq2Seq, *, count: int = 30, stop_ids: Collection[int] = (), **settings: Any) -> list[int]:
    return list(generate_seq2seq(model, SOURCE, max_new_tokens=count, stop_ids=stop_ids, **settings))


def logits_without_cache(model: ToySeq2Seq, ids: list[int]) -> torch.Tensor:
    """What comes after ids, all of which are read at once."""
    lengths = torch.tensor([len(SOURCE)])
    cache = model.new_cache(model.encode(torch.tensor([SOURCE]), lengths), lengths, capacity=len(ids))
    return model.head(model.decode(torch.tensor([ids]), cache=cache))[0, -1]


@pytest.mark.parametrize("seed", range(4))
def test_greedy_tokens_with_the_caches_are_those_without(seed: int) -> None:
    model = ToySeq2Seq(Sizes(start_id=3), seed=seed)
    expected = [3]
    for _ in range(30):
        expected.append(int(logits_without_cache(model, expected).argmax()))
    assert len(set(expected)) > 5, "a model that repeats itself shows little"
    assert given(model) == expected[1:]


def test_the_source_is_read_once_and_decides_what_is_said() -> None:
    model = ToySeq2Seq()
    first = given(model)
    assert model.encoded == 1
    assert list(generate_seq2seq(model, [9, 1], max_new_tokens=30, stop_ids=())) != first


def test_generation_ends_before_any_of_the_stop_ids_even_at_the_first_token() -> None:
    model = ToySeq2Seq()
    free = given(model)
    at = free.index(free[7])
    assert given(model, stop_ids={free[7], 10_000}) == free[:at]
    assert given(model, stop_ids=set(free)) == []


@pytest.mark.parametrize("count", [0, 1, 7])
def test_no_more_than_max_new_tokens_come(count: int) -> None:
    assert len(given(ToySeq2Seq(), count=count)) == count


def test_a_seed_repeats_its_draws_and_leaves_the_global_generator_alone() -> None:
    model = ToySeq2Seq()
    before = torch.get_rng_state()
    assert given(model, temperature=1.0, seed=1) == given(model, temperature=1.0, seed=1)
    assert given(model, temperature=1.0, seed=1) != given(model, temperature=1.0, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_vanishing_top_p_takes_the_likeliest_tokens() -> None:
    model = ToySeq2Seq()
    assert given(model, temperature=1.5, top_p=1e-9) == given(model)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"beams": 3}], ids=str)
def test_a_model_whose_logits_are_not_finite_is_an_error(settings: dict[str, Any]) -> None:
    model = ToySeq2Seq()
    model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity at position 1"):
        given(model, **settings)


def test_a_source_without_tokens_is_refused_at_once() -> None:
    with pytest.raises(UsageProblem, match="nothing to answer"):
        generate_seq2seq(ToySeq2Seq(), [], max_new_tokens=5, stop_ids=())


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        generate_seq2seq(ToySeq2Seq().train(), SOURCE, max_new_tokens=5, stop_ids=())


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.open(tiny_checkpoint(tmp_path))


def loaded(model: ToySeq2Seq) -> LoadedModel:
    architecture = Architecture(
        name="toy", model_types=("toy",), kind="seq2seq", task_type="SEQ_2_SEQ_LM", build=lambda _: model, blocks=(),
        quantize=(), keep_16bit=(), adapt=(),
    )  # fmt: skip
    size = {"vocab_size": model.sizes.vocabulary}
    return LoadedModel(model, architecture, size, {"eos_token_id": [9, 11]}, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "seed": 3}, {"beams": 2}], ids=str)
def test_the_stage_reads_the_prompt_as_training_does_and_gives_the_answers_text(
    tokenizer: Tokenizer, settings: dict[str, Any]
) -> None:
    model = ToySeq2Seq(Sizes(vocabulary=tokenizer.vocab_size, start_id=2))
    ids, _ = tokenizer.encode("a fox")
    # What a tokenizer puts behind a text ends a source.
    tokenizer = replace(tokenizer, behind=(5, tokenizer.eos_id))
    source = [1, *ids, 5, tokenizer.eos_id]
    expected = generate_seq2seq(model, source, max_new_tokens=40, stop_ids={2, 9, 11}, **settings)
    config = GenerateConfig(max_new_tokens=40, **settings)
    assert "".join(answer(loaded(model), tokenizer, "a fox", config)) == tokenizer.decode(list(expected)) != ""


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer) -> None:
    model = ToySeq2Seq(Sizes(vocabulary=2))
    with pytest.raises(DataError, match="vocabulary ends at 1"):
        list(answer(loaded(model), tokenizer, "a fox", GenerateConfig()))
