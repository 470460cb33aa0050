"""Generation: which tokens are chosen, where it ends, and when their text is shown."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from qlora_pipe.errors import NonFiniteError, UsageProblem
from qlora_pipe.generate import generate, stream_text
from qlora_pipe.nn.cache import Cache, KVCache
from qlora_pipe.nn.decoder import DecoderModel
from qlora_pipe.testing import byte_tokenizer, filled, tiny_weights
from qlora_plugins.llama import register_architectures

PROMPT = [1, 17, 4, 60]


def tiny_llama(**overrides: Any) -> DecoderModel:
    config = {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 71,
        "max_position_embeddings": 64,
        **overrides,
    }
    architecture = register_architectures()[0]
    model = filled(architecture, config, tiny_weights(config, seed=5), dtype=torch.float64)
    assert isinstance(model, DecoderModel)
    return model


class FixedLogits:
    """A model that says the same after every token, whatever came before."""

    training = False
    context = 10_000

    def __init__(self, logits: Sequence[float]) -> None:
        self.logits = torch.tensor(logits)

    def hidden(self, ids: Tensor, *, cache: Cache | None = None) -> Tensor:
        return torch.zeros(*ids.shape, 1)

    def head(self, hidden: Tensor) -> Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache(
            layers=1,
            batch=batch,
            kv_heads=1,
            capacity=capacity,
            head_dim=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_greedy_tokens_with_the_cache_are_those_without(overrides: dict[str, Any]) -> None:
    model = tiny_llama(**overrides)
    expected = list(PROMPT)
    for _ in range(50):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert len(set(expected)) > 10, "a model that repeats itself shows little"
    assert list(generate(model, PROMPT, max_new_tokens=50, stop_ids=())) == expected[len(PROMPT) :]


def test_generation_ends_before_a_stop_id() -> None:
    model = tiny_llama()
    free = list(generate(model, PROMPT, max_new_tokens=20, stop_ids=()))
    at = free.index(free[7])
    assert list(generate(model, PROMPT, max_new_tokens=20, stop_ids={free[7]})) == free[:at]
    assert list(generate(model, PROMPT, max_new_tokens=20, stop_ids=free)) == []


def test_generation_ends_at_max_new_tokens_or_at_the_end_of_the_context() -> None:
    model = tiny_llama()
    assert len(list(generate(model, PROMPT, max_new_tokens=7, stop_ids=()))) == 7
    assert len(list(generate(model, PROMPT, max_new_tokens=0, stop_ids=()))) == 0
    assert len(list(generate(model, PROMPT, max_new_tokens=500, stop_ids=()))) == 64 - len(PROMPT)
    assert len(list(generate(model, list(range(63)), max_new_tokens=500, stop_ids=()))) == 1


@pytest.mark.parametrize(
    ("ids", "said"),
    [([], "nothing to continue"), (list(range(64)), "has 64 tokens, and the model's context ends at 64")],
)
def test_a_prompt_without_tokens_or_room_is_refused_at_once(ids: list[int], said: str) -> None:
    with pytest.raises(UsageProblem, match=said):
        generate(tiny_llama(), ids, max_new_tokens=5, stop_ids=())


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.5), (1.0, float("nan"))]
)
def test_settings_of_no_meaning_are_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match="must be at least 0"):
        generate(tiny_llama(), PROMPT, max_new_tokens=5, stop_ids=(), temperature=temperature, top_p=top_p)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        generate(tiny_llama().train(), PROMPT, max_new_tokens=5, stop_ids=())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(broken: float, temperature: float) -> None:
    tokens = generate(FixedLogits([0.0, broken, 1.0]), [0], max_new_tokens=5, stop_ids=(), temperature=temperature)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        next(tokens)


def test_a_seed_repeats_its_draws_and_leaves_the_global_generator_alone() -> None:
    model = tiny_llama()

    def drawn(seed: int) -> list[int]:
        return list(generate(model, PROMPT, max_new_tokens=30, stop_ids=(), temperature=1.0, seed=seed))

    before = torch.get_rng_state()
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = [1.0, -2.0, 0.5, 3.0]
    tokens = list(generate(FixedLogits(logits), [0], max_new_tokens=8000, stop_ids=(), temperature=2.0, seed=3))
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / len(tokens)
    # Four standard errors of a share of one half.
    assert (shares - (torch.tensor(logits) / 2).softmax(-1)).abs().max() < 4 * 0.5 / 8000**0.5


def test_top_p_draws_from_the_likeliest_tokens_that_together_reach_it() -> None:
    # Shares of 0.5, 0.3, 0.15 and 0.05.
    model = FixedLogits(torch.tensor([0.05, 0.5, 0.15, 0.3]).log().tolist())

    def drawn(top_p: float) -> set[int]:
        return set(generate(model, [0], max_new_tokens=500, stop_ids=(), temperature=1.0, top_p=top_p))

    assert drawn(0.01) == {1}
    assert drawn(0.49) == {1}
    assert drawn(0.51) == {1, 3}
    assert drawn(0.81) == {1, 2, 3}
    assert drawn(1.0) == {0, 1, 2, 3}


def test_the_inference_mode_does_not_leak_to_the_caller() -> None:
    for _ in generate(tiny_llama(), PROMPT, max_new_tokens=2, stop_ids=()):
        assert not torch.is_inference_mode_enabled()


class Decoding:
    """A tokenizer as the pipeline has one: control tokens are dropped."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner = inner

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True))


def byte_fallback_tokenizer() -> Tokenizer:
    """Make a LLaMA-like tokenizer: words with their space in front, and bytes for what is in no word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁cat", "s", "é", "▁▁", "▁日"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def byte_ids(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def ids_of(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


TOKENIZERS = {"byte level": Decoding(byte_tokenizer()), "byte fallback": Decoding(byte_fallback_tokenizer())}
WORDS = st.sampled_from([[259], [260], [261], [262], [263], [264], [1], [2], ids_of("é"), ids_of("日本"), ids_of("\n")])
PARTS = st.lists(WORDS | st.lists(st.integers(0, 264), max_size=3), max_size=40)
SEQUENCES = PARTS.map(lambda parts: [token for part in parts for token in part])


def added_text(tokenizer: Decoding, prompt: list[int], ids: list[int]) -> str:
    """Give what ids add to a prompt's text, by the definition: all but what the two decodings begin with in common."""
    before, after = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    common = next((i for i in range(len(before)) if before[i : i + 1] != after[i : i + 1]), len(before))
    return after[common:]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=300)
@given(prompt=SEQUENCES, ids=SEQUENCES)
def test_the_pieces_of_a_stream_are_the_text_that_its_ids_add(kind: str, prompt: list[int], ids: list[int]) -> None:
    tokenizer = TOKENIZERS[kind]
    assert "".join(stream_text(tokenizer, ids, prompt=prompt)) == added_text(tokenizer, prompt, ids)


@pytest.mark.parametrize("name", ["models/stories260K", "tokenizers/mistral", "tokenizers/t5"])
def test_real_tokenizers_stream_the_text_that_their_ids_add(shared_data: Path, name: str) -> None:
    tokenizer = Decoding(Tokenizer.from_file(str(shared_data / name / "tokenizer.json")))
    draws = torch.Generator().manual_seed(0)
    text = 'Once upon a time, "Zoë" saw 3 日本 cats 🐈🐈 and\n\n said: "Ça va?"  Yes!\n'
    real = tokenizer.inner.encode(text * 3, add_special_tokens=False).ids
    for low, high in [(0, 300), (0, tokenizer.inner.get_vocab_size())]:
        ids = [*real, *torch.randint(low, high, (300,), generator=draws).tolist(), *real]
        for cut in [0, 1, 20, 60, len(real), len(real) + 100]:
            streamed = "".join(stream_text(tokenizer, ids[cut:], prompt=ids[:cut]))
            assert streamed == added_text(tokenizer, ids[:cut], ids[cut:])


def shown_by(kind: str, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    """Say what has been shown just before each further id is taken, and at the end."""
    shown = ""
    history: list[str] = []

    def taken() -> Iterator[int]:
        for token in ids:
            history.append(shown)
            yield token

    for piece in stream_text(TOKENIZERS[kind], taken(), prompt=prompt):
        shown += piece
    return [*history, shown]


def test_words_are_shown_as_they_come_and_keep_their_leading_space() -> None:
    assert shown_by("byte fallback", [260, 260, 261], prompt=[1, 260]) == ["", " cat", " cat cat", " cat cats"]


def test_a_long_run_of_control_tokens_takes_no_space_from_the_word_after_it() -> None:
    ids = [260] * 60 + [2] * 100 + [260]
    assert shown_by("byte fallback", ids)[-1] == " ".join(["cat"] * 61)


def test_half_a_character_is_held_back() -> None:
    assert shown_by("byte level", byte_ids("a日b")) == ["", "a", "a", "a", "a日", "a日b"]


def test_a_run_of_bytes_is_shown_when_no_wrong_byte_can_break_it_any_more() -> None:
    euro = ids_of("€")
    assert shown_by("byte fallback", [260, *euro, 261]) == ["", "cat", "cat", "cat", "cat", "cat€s"]
    assert shown_by("byte fallback", [260, *euro, 3 + 0xFF, 261])[-2:] == ["cat", "cat\ufffd\ufffd\ufffd\ufffds"]


def test_what_was_held_back_is_shown_at_the_end() -> None:
    assert shown_by("byte fallback", [260, *ids_of("€")])[-1] == "cat€"
    assert shown_by("byte level", byte_ids("日")[:2])[-1] == "\ufffd"
