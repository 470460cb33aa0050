"""Samples: one string, one tokenisation, a mask by characters, one EOS label per answer, windows of a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_pipe.data.encode import Sample, encode, pieces
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import Example, Message, Role, prompt_and_answer
from qlora_pipe.errors import DataError


class Letters(Tokenizer):
    """A stand-in whose ids are the characters' own code points: nothing ever straddles a border."""

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return [ord(letter) for letter in text], [(place, place + 1) for place in range(len(text))]


def _letters(*, bos_id: int | None) -> Tokenizer:
    return Letters(bos_id=bos_id, eos_id=2, vocab_size=0x110000, digest="", inner=None)  # type: ignore[arg-type]


def _chat(*turns: tuple[Role, str]) -> Example:
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return Example(messages=messages, origin="rows.jsonl:7")


def _only(example: Example, tokenizer: Tokenizer, *, max_tokens: int = 10_000) -> Sample:
    (sample,) = encode(example, tokenizer, max_tokens=max_tokens)
    return sample


def _targets(sample: Sample) -> list[int]:
    return [int(token) for token in sample.ids[sample.trained]]


def _pair(prompt: str, answer: str) -> Example:
    return prompt_and_answer(prompt, answer, origin="rows.jsonl:7")


def test_prompt_and_answer_become_bos_prompt_answer_eos_with_the_answer_trained() -> None:
    sample = _only(_pair("ab:", "cd"), _letters(bos_id=1))
    assert sample.ids.tolist() == [1, *b"ab:cd", 2]
    assert sample.trained.tolist() == [False, False, False, False, True, True, True]
    assert (str(sample.ids.dtype), str(sample.trained.dtype), sample.origin) == ("int32", "bool", "rows.jsonl:7")


def test_without_bos_the_first_token_of_a_bare_answer_is_no_target() -> None:
    sample = _only(_pair("", "cd"), _letters(bos_id=None))
    assert sample.ids.tolist() == [*b"cd", 2]
    assert sample.trained.tolist() == [False, True, True]


def test_token_over_the_border_is_trained(tiny_tokenizer: Tokenizer) -> None:
    sample = _only(_pair("the: ", "yes"), tiny_tokenizer)
    assert [tiny_tokenizer.inner.id_to_token(int(token)) for token in sample.ids] == [
        "<s>", "▁", "the", ":", "▁yes", "</s>"
    ]  # fmt: skip
    assert sample.trained.tolist() == [False, False, False, False, True, True]


def test_prompt_and_answer_are_tokenised_as_one_string(tiny_tokenizer: Tokenizer) -> None:
    sample = _only(_pair("the: ", "yes"), tiny_tokenizer)
    assert sample.ids.tolist() == [1, *tiny_tokenizer.encode("the: yes")[0], 2]
    apart = tiny_tokenizer.encode("the: ")[0] + tiny_tokenizer.encode("yes")[0]
    assert sample.ids.tolist() != [1, *apart, 2]


def test_conversation_is_rendered_in_guanacos_form() -> None:
    example = _chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "No"), ("assistant", "Ok"))
    assert [(piece.text, piece.text[piece.answer_start :]) for piece in pieces(example)] == [
        ("Be kind.\n### Human: Hi\n### Assistant: Yes?", "Yes?"),
        ("### Human: No\n### Assistant: Ok", "Ok"),
    ]


def test_every_answer_of_a_conversation_is_trained_and_ends_with_eos() -> None:
    sample = _only(_chat(("user", "Hi"), ("assistant", "Yes"), ("user", "No"), ("assistant", "Ok")), _letters(bos_id=1))
    assert _targets(sample) == [*b"Yes", 2, *b"Ok", 2]
    assert sample.ids.tolist() == [
        1, *b"### Human: Hi\n### Assistant: Yes", 2, *b"### Human: No\n### Assistant: Ok", 2
    ]  # fmt: skip


turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=12)), max_size=6)


@given(turns=turns, answer=st.text(min_size=1, max_size=12), chat=st.booleans(), bos=st.booleans())
def test_targets_are_the_answers_each_with_one_eos(
    turns: list[tuple[Role, str]], answer: str, chat: bool, bos: bool
) -> None:
    turns = [(role, content or "x") for role, content in [*turns, ("assistant", answer)]]
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    example = Example(messages=messages, origin="x:1", form=None if chat else "plain")
    sample = _only(example, _letters(bos_id=1 if bos else None))
    wanted = [token for role, content in turns if role == "assistant" for token in [*map(ord, content), 2]]
    first_is_answer = not bos and not chat and turns[0][0] == "assistant"
    assert _targets(sample) == wanted[first_is_answer:]


def test_control_tokens_in_a_row_add_no_eos_label(tiny_tokenizer: Tokenizer) -> None:
    sample = _only(_pair("no</s> ", "yes</s><s>no"), tiny_tokenizer)
    assert _targets(sample).count(tiny_tokenizer.eos_id) == 1
    assert sample.ids.tolist().count(tiny_tokenizer.eos_id) == 1
    assert sample.ids.tolist().count(tiny_tokenizer.bos_id) == 1


def test_long_sample_is_cut_and_loses_its_eos() -> None:
    tokenizer = _letters(bos_id=1)
    whole = _only(_pair("ab:", "cdef"), tokenizer, max_tokens=9)
    assert (len(whole.ids), whole.cut) == (9, False)
    cut = _only(_pair("ab:", "cdef"), tokenizer, max_tokens=8)
    assert (cut.ids.tolist(), cut.cut) == (whole.ids.tolist()[:8], True)
    assert _targets(cut) == [*b"cdef"]


def test_sample_cut_before_its_answer_is_an_error_that_names_the_row() -> None:
    tokenizer = _letters(bos_id=1)
    assert _targets(_only(_pair("ab:", "cd"), tokenizer, max_tokens=5)) == [*b"c"]
    with pytest.raises(DataError) as caught:
        encode(_pair("ab:", "cd"), tokenizer, max_tokens=4)
    assert str(caught.value) == (
        "rows.jsonl:7: nothing is left to train: the sample has 7 tokens, its answer begins at token 5 and"
        " --max-tokens is 4; raise --max-tokens or remove the row"
    )


def test_answer_without_tokens_is_an_error(tokenizer_folder: Callable[..., Path]) -> None:
    def drop_spaces_at_the_end(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Strip", "strip_left": False, "strip_right": True}

    tokenizer = Tokenizer.open(tokenizer_folder(change=drop_spaces_at_the_end))
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: the tokenizer makes no token of the answer$"):
        encode(_pair("yes", "  "), tokenizer, max_tokens=16)


def test_text_the_tokenizer_refuses_is_an_error_that_names_the_row(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: the text holds a lone surrogate at character 4$"):
        encode(_pair("yes", "n\udfff"), tiny_tokenizer, max_tokens=16)


@pytest.mark.parametrize(
    "example",
    [_chat(("assistant", "Hi"), ("user", "No")), _chat(("user", "No")), _chat()],
    ids=["question last", "no answer", "nothing"],
)
def test_conversation_without_a_last_answer_is_an_error(example: Example) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: "):
        encode(example, _letters(bos_id=1), max_tokens=99)


def test_text_beside_turns_is_an_error() -> None:
    with pytest.raises(DataError, match="text alone, or the turns of a conversation"):
        encode(_chat(("text", "once"), ("assistant", "upon")), _letters(bos_id=1), max_tokens=99)


def _windows(text: str, *, bos_id: int | None, max_tokens: int) -> list[Sample]:
    example = Example(messages=(Message(role="text", content=text),), origin="tale.txt")
    return list(encode(example, _letters(bos_id=bos_id), max_tokens=max_tokens))


def test_text_is_cut_into_windows_that_begin_with_bos_and_end_with_eos() -> None:
    windows = _windows("abcdefg", bos_id=1, max_tokens=4)
    assert [window.ids.tolist() for window in windows] == [[1, *b"abc"], [1, *b"def"], [1, *b"g", 2]]
    assert [window.trained.tolist() for window in windows] == [[False] + [True] * n for n in (3, 3, 2)]
    assert [window.origin for window in windows] == ["tale.txt window 1", "tale.txt window 2", "tale.txt window 3"]


def test_window_without_bos_begins_with_the_token_before_it() -> None:
    windows = _windows("abcdefg", bos_id=None, max_tokens=4)
    assert [window.ids.tolist() for window in windows] == [[*b"abcd"], [*b"defg"], [*b"g", 2]]


def test_window_of_bos_and_eos_alone_is_dropped() -> None:
    assert [window.ids.tolist() for window in _windows("abc", bos_id=1, max_tokens=4)] == [[1, *b"abc"]]


@given(text=st.text(min_size=1, max_size=60), max_tokens=st.integers(2, 20), bos=st.booleans())
def test_windows_train_every_token_of_a_document_exactly_once(text: str, max_tokens: int, bos: bool) -> None:
    windows = _windows(text, bos_id=1 if bos else None, max_tokens=max_tokens)
    targets = [token for window in windows for token in _targets(window)]
    wanted = [*map(ord, text), 2]
    if not bos:
        # Nothing stands before the first.
        assert targets == wanted[1:]
    elif len(text) % (max_tokens - 1) == 0:
        assert targets == wanted[:-1]
    else:
        assert targets == wanted
    assert all(2 <= len(window.ids) <= max_tokens for window in windows)
    assert all(len(window.ids) == max_tokens for window in windows[:-1])


def test_text_without_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match=r"^tale\.txt: the tokenizer makes no token of the text$"):
        _windows("", bos_id=1, max_tokens=4)


PROMPTS = ["### Response: ", "Q:\n\n", "", "naïve 🙂", "x "]
ANSWERS = ["yes", " Paris, of course.", "\n\nA list:\n  1. é\n", "🙂🙂", "</s>"]


@pytest.mark.parametrize("answer", ANSWERS, ids=repr)
@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_mask_of_a_real_tokenizer_covers_the_answers_characters(shared_data: Path, prompt: str, answer: str) -> None:
    tokenizer = Tokenizer.open(shared_data / "tokenizers" / "mistral")
    sample = _only(_pair(prompt, answer), tokenizer)
    ids, offsets = tokenizer.encode(prompt + answer)
    assert sample.ids.tolist() == [1, *ids, 2]
    in_answer = set(range(len(prompt), len(prompt + answer)))
    wanted = [bool(in_answer & set(range(*offset))) for offset in offsets]
    assert sample.trained.tolist() == [False, *wanted, True]
    first = wanted.index(True)
    # Decoding what is not trained gives no more than the prompt; the rest holds the answer whole.
    assert prompt.startswith(tokenizer.decode(ids[:first]))
    assert (prompt + answer)[offsets[first][0] :].endswith(answer)
    assert all(wanted[first:])
