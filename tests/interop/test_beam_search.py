"""Our beam search against transformers': the same text, on random models of both kinds and on real ones."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from qlora_pipe.generate import generate, generate_seq2seq
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.language import Inputs
from qlora_pipe.nn.seq2seq import Seq2SeqModel
from qlora_pipe.testing import tiny_checkpoint
from tests.interop.peers import ours

PENALTIES = [-2.0, 0.0, 0.5, 1.0, 3.0]


class TheirCache:
    """transformers' caches of both sides, and what its decoder is told of the source."""

    def __init__(self, memory: Tensor, lengths: Tensor) -> None:
        self.inner = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.memory, self.mask = memory, (torch.arange(memory.shape[1]) < lengths[:, None]).long()
        self.length = 0

    def reorder(self, rows: Tensor) -> None:
        self.inner.reorder_cache(rows)


class TheirT5(Seq2SeqModel):
    """transformers' own T5 as our generation asks for a model, so that nothing differs but the search."""

    def __init__(self, inner: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return []

    @property
    def start_id(self) -> int:
        return int(self.inner.config.decoder_start_token_id)

    def begin(self, inputs: Inputs) -> tuple[Tensor, Any]:
        raise AssertionError("this model is not trained")

    def finish(self, state: Any) -> Tensor:
        raise AssertionError("this model is not trained")

    def head(self, hidden: Tensor) -> Tensor:
        if self.inner.config.scale_decoder_outputs:
            hidden = hidden * self.inner.config.d_model**-0.5
        logits: Tensor = self.inner.lm_head(hidden)
        return logits

    def encode(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        mask = (torch.arange(source.shape[1]) < source_lengths[:, None]).long()
        memory: Tensor = self.inner.encoder(input_ids=source, attention_mask=mask).last_hidden_state
        return memory

    def new_cache(self, memory: Tensor, source_lengths: Tensor, *, capacity: int) -> TheirCache:
        return TheirCache(memory, source_lengths)

    def decode(self, ids: Tensor, *, cache: TheirCache) -> Tensor:  # type: ignore[override]
        done = self.inner.decoder(
            input_ids=ids,
            encoder_hidden_states=cache.memory,
            encoder_attention_mask=cache.mask,
            past_key_values=cache.inner,
            use_cache=True,
        )
        cache.length += ids.shape[1]
        states: Tensor = done.last_hidden_state
        return states


def random_t5(seed: int) -> T5ForConditionalGeneration:
    draw = random.Random(seed)
    config = T5Config(
        vocab_size=37,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_heads=3,
        num_layers=2,
        num_decoder_layers=2,
        feed_forward_proj=draw.choice(["relu", "gated-gelu"]),
        tie_word_embeddings=draw.random() < 0.5,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config).double().eval().requires_grad_(False)
    draws = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Enough that what a model says depends on all that it has read.
        parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64) * 0.4)
    return model


def random_llama(folder: Path, seed: int) -> tuple[CausalModel, LlamaForCausalLM]:
    tiny_checkpoint(folder, seed=seed, vocab_size=41, hidden_size=24, intermediate_size=40, dtype=torch.float32)
    model = ours(folder, dtype=torch.float64)
    assert isinstance(model, CausalModel)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
    return model, theirs


def their_text(model: Any, ids: Sequence[int], *, stop_ids: Sequence[int], **settings: Any) -> list[int]:
    """What their search finds after a prompt, without the stop id and what comes behind it."""
    found = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), do_sample=False, pad_token_id=0,
        eos_token_id=list(stop_ids), **settings,
    )[0].tolist()  # fmt: skip
    found = found[1 if model.config.is_encoder_decoder else len(ids) :]
    stop = next((place for place, token in enumerate(found) if token in stop_ids), len(found))
    return found[:stop]


def settings_of(seed: int) -> tuple[list[int], int, int, float, int]:
    """Stop ids, beams, the power of the length and the room of one case."""
    draw = random.Random(seed)
    stops = draw.sample(range(1, 37), draw.choice([1, 2, 4, 7]))
    return stops, draw.choice([2, 3, 5, 8]), draw.choice([1, 2, 9, 25]), draw.choice(PENALTIES), draw.randint(1, 12)


def test_t5_finds_the_texts_that_transformers_finds(record_property: Any) -> None:
    ended_early = 0
    for seed in range(40):
        stops, beams, room, penalty, length = settings_of(seed)
        model = random_t5(seed)
        source = [random.Random(seed).randrange(2, 37) for _ in range(length)]
        expected = their_text(
            model, source, stop_ids=stops, num_beams=beams, length_penalty=penalty, max_new_tokens=room
        )
        found = generate_seq2seq(
            TheirT5(model), source, max_new_tokens=room, stop_ids=stops, beams=beams, length_penalty=penalty
        )
        assert list(found) == expected, seed
        ended_early += len(expected) < room
    record_property("counted", f"{ended_early} of 40 searches with T5 ended with a stop id")
    assert 5 < ended_early < 35, "both ways to end are to be seen"


def test_llama_finds_the_texts_that_transformers_finds(tmp_path: Path, record_property: Any) -> None:
    ended_early = 0
    for seed in range(25):
        stops, beams, room, penalty, length = settings_of(seed)
        model, theirs = random_llama(tmp_path / f"{seed}", seed)
        prompt = [1, *(random.Random(seed).randrange(2, 41) for _ in range(length))]
        expected = their_text(
            theirs, prompt, stop_ids=stops, num_beams=beams, length_penalty=penalty, max_new_tokens=room
        )
        found = generate(model, prompt, max_new_tokens=room, stop_ids=stops, beams=beams, length_penalty=penalty)
        assert list(found) == expected, seed
        ended_early += len(expected) < room
    record_property("counted", f"{ended_early} of 25 searches with LLaMA ended with a stop id")
    assert 5 < ended_early < 22, "both ways to end are to be seen"


@pytest.mark.parametrize("beams", [1, 4])
def test_a_real_t5_says_what_it_says_in_transformers(shared_data: Path, beams: int) -> None:
    folder = shared_data / "models" / "t5-stories-280k"
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
    source = AutoTokenizer.from_pretrained(folder)("Once upon a time, there was a little girl").input_ids
    expected = their_text(model, source, stop_ids=[1], num_beams=beams, max_new_tokens=60)
    found = list(generate_seq2seq(TheirT5(model), source, max_new_tokens=60, stop_ids=[1], beams=beams))
    assert found == expected
    assert len(found) > 5


def test_a_real_llama_finds_the_text_that_transformers_finds(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260K"
    model = ours(folder, dtype=torch.float64)
    assert isinstance(model, CausalModel)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
    prompt = AutoTokenizer.from_pretrained(folder)("Once upon a time").input_ids
    for penalty in (0.0, 1.0):
        expected = their_text(theirs, prompt, stop_ids=[2], num_beams=4, length_penalty=penalty, max_new_tokens=40)
        found = generate(model, prompt, max_new_tokens=40, stop_ids=[2], beams=4, length_penalty=penalty)
        assert list(found) == expected
