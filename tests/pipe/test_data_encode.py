"""Samples: one rendering, one tokenisation, a mask by characters, one end of turn per answer, windows of a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_pipe.data.encode import Encoder, Sample
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import Example, Message, Role, prompt_and_answer
from qlora_pipe.errors import DataError
from tests.pipe.encoders import byte_folder, chat, encoder_of, sample_of, samples_of, targets_of, text_of

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    return Tokenizer.open(byte_folder(folder, special=("<|im_start|>", "<|im_end|>"), add_bos_token=True))


@pytest.fixture(scope="session")
def bytes_without_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.open(byte_folder(tmp_path_factory.mktemp("bytes"), add_bos_token=False))


@pytest.fixture(scope="session")
def mistral(shared_data: Path) -> Tokenizer:
    return Tokenizer.open(shared_data / "tokenizers" / "mistral")


def _pair(prompt: str, answer: str) -> Example:
    return prompt_and_answer(prompt, answer, origin="rows.jsonl:7")


def _fault(example: Example, encoder: Encoder) -> str:
    with pytest.raises(DataError) as caught:
        samples_of(example, encoder)
    return str(caught.value)


def test_prompt_and_answer_become_bos_prompt_answer_eos_with_the_answer_trained(byte_tokens: Tokenizer) -> None:
    sample = sample_of(_pair("ab:", "cd"), encoder := encoder_of(byte_tokens))
    assert text_of(sample, encoder) == "<s>ab:cd</s>"
    assert sample.trained.tolist() == [False, False, False, False, True, True, True]
    assert (str(sample.ids.dtype), str(sample.trained.dtype), sample.origin) == ("int32", "bool", "rows.jsonl:7")
    assert sample.source is None


def test_without_bos_the_first_token_of_a_bare_answer_is_no_target(bytes_without_bos: Tokenizer) -> None:
    sample = sample_of(_pair("", "cd"), encoder := encoder_of(bytes_without_bos))
    assert text_of(sample, encoder) == "cd</s>"
    assert sample.trained.tolist() == [False, True, True]


def test_token_over_the_border_is_trained(tiny_tokenizer: Tokenizer) -> None:
    sample = sample_of(_pair("the: ", "yes"), encoder_of(tiny_tokenizer))
    assert [tiny_tokenizer.inner.id_to_token(int(token)) for token in sample.ids] == [
        "<s>", "▁", "the", ":", "▁yes", "</s>"
    ]  # fmt: skip
    assert sample.trained.tolist() == [False, False, False, False, True, True]


def test_prompt_and_answer_are_tokenised_as_one_string(tiny_tokenizer: Tokenizer) -> None:
    sample = sample_of(_pair("the: ", "yes"), encoder_of(tiny_tokenizer))
    assert sample.ids.tolist() == [1, *tiny_tokenizer.encode("the: yes")[0], 2]
    apart = tiny_tokenizer.encode("the: ")[0] + tiny_tokenizer.encode("yes")[0]
    assert sample.ids.tolist() != [1, *apart, 2]


def test_every_answer_of_a_conversation_is_trained_and_ends_with_eos(byte_tokens: Tokenizer) -> None:
    example = chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes"), ("user", "No"), ("assistant", "Ok"))
    sample = sample_of(example, encoder := encoder_of(byte_tokens))
    assert text_of(sample, encoder) == (
        "<s>Be kind.\n### Human: Hi ### Assistant: Yes</s> ### Human: No ### Assistant: Ok</s>"
    )
    assert targets_of(sample, encoder) == " Yes</s> Ok</s>"


def test_the_checkpoints_own_template_is_tokenised_exactly_as_it_is_rendered(byte_tokens: Tokenizer) -> None:
    example = chat(("user", "Hi"), ("assistant", "Yes"), ("user", "No"), ("assistant", "Ok"))
    sample = sample_of(example, encoder := encoder_of(byte_tokens, own=CHATML))
    turns = (("user", "Hi"), ("assistant", "Yes"), ("user", "No"), ("assistant", "Ok"))
    assert text_of(sample, encoder) == "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
    assert sample.ids.tolist().count(byte_tokens.inner.token_to_id("<|im_end|>")) == 4


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("answers", "Yes<|im_end|>Ok<|im_end|>"),
        ("last", "Ok<|im_end|>"),
        (
            "all",
            "user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
            "<|im_start|>user\nNo<|im_end|>\n<|im_start|>assistant\nOk<|im_end|>\n",
        ),
    ],
)
def test_train_on_says_what_is_trained(
    byte_tokens: Tokenizer, train_on: Literal["answers", "all", "last"], wanted: str
) -> None:
    example = chat(("user", "Hi"), ("assistant", "Yes"), ("user", "No"), ("assistant", "Ok"))
    sample = sample_of(example, encoder := encoder_of(byte_tokens, own=CHATML, train_on=train_on))
    assert targets_of(sample, encoder) == wanted


letters = st.characters(max_codepoint=0x10DFFF, exclude_categories=("Cs",))
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(letters, max_size=12)), max_size=6)
FORMS: list[str | None] = [None, "plain", "alpaca", "chatml"]


@given(turns=turns, answer=st.text(letters, min_size=1, max_size=12), form=st.sampled_from(FORMS))
def test_targets_are_the_answers_each_with_its_end(
    byte_tokens: Tokenizer, turns: list[tuple[Role, str]], answer: str, form: str | None
) -> None:
    turns = [(role, content or "x") for role, content in [*turns, ("assistant", answer)]]
    sample = sample_of(chat(*turns, form=form), encoder := encoder_of(byte_tokens))
    before, after = {None: (" ", ""), "chatml": ("", "<|im_end|>")}.get(form, ("", ""))
    wanted = [before + content + after + "</s>" for role, content in turns if role == "assistant"]
    assert targets_of(sample, encoder) == "".join(wanted)
    ends = sample.ids[sample.trained].tolist().count(byte_tokens.eos_id)
    assert ends == len(wanted)


@given(contents=st.lists(st.text("<|>_/imstartend \n", max_size=20), min_size=2, max_size=5))
def test_no_text_becomes_a_control_token(byte_tokens: Tokenizer, contents: list[str]) -> None:
    spoken = [("assistant" if index % 2 else "user", content or "x") for index, content in enumerate(contents)]
    spoken = spoken if spoken[-1][0] == "assistant" else [*spoken, ("assistant", "y")]
    sample = sample_of(chat(*spoken, form="chatml"), encoder_of(byte_tokens))  # type: ignore[arg-type]
    ids = sample.ids.tolist()
    answers = len(spoken) // 2
    start, end = (byte_tokens.inner.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    assert (ids.count(start), ids.count(end)) == (len(spoken), len(spoken))
    assert (ids.count(byte_tokens.bos_id), ids.count(byte_tokens.eos_id)) == (1, answers)


@pytest.mark.parametrize("said", ["<|im_end|>", "<|im_", "_end|>", "a<|im_end|>\n<|im_start|>assistant\nb", "</s>"])
def test_a_turn_that_holds_a_control_tokens_name_stays_text_at_every_border(byte_tokens: Tokenizer, said: str) -> None:
    # The template itself writes halves of a control token's name at both ends of a text.
    own = (
        "{% for m in messages %}{{ '<|im' + m.content + 'im_end|>' }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im' }}{% endif %}"
    )
    sample = sample_of(chat(("assistant", said)), encoder := encoder_of(byte_tokens, own=own))
    assert sample.ids.tolist() == [
        *(byte_tokens.inner.token_to_id(letter) for letter in f"<|im{said}im_end|>".replace("\n", "Ċ")), 2
    ]  # fmt: skip
    assert targets_of(sample, encoder) == f"{said}im_end|></s>"


def test_control_tokens_in_a_row_add_no_eos_label(tiny_tokenizer: Tokenizer) -> None:
    sample = sample_of(_pair("no</s> ", "yes</s><s>no"), encoder_of(tiny_tokenizer))
    assert sample.ids[sample.trained].tolist().count(tiny_tokenizer.eos_id) == 1
    assert sample.ids.tolist().count(tiny_tokenizer.eos_id) == 1
    assert sample.ids.tolist().count(tiny_tokenizer.bos_id) == 1


def test_a_vocabulary_that_lists_control_tokens_as_words_reads_them_as_text_all_the_same(shared_data: Path) -> None:
    tokenizer = Tokenizer.open(shared_data / "tokenizers" / "t5")
    sample = sample_of(_pair("Say </s> or <extra_id_0>: ", "<pad> yes</s>"), encoder_of(tokenizer))
    assert sample.ids.tolist().count(tokenizer.eos_id) == 1
    assert not {0, 32099} & set(sample.ids.tolist())


def test_a_pad_token_that_is_eos_changes_nothing(byte_tokens: Tokenizer, tmp_path: Path) -> None:
    folder = byte_folder(tmp_path, special=("<|im_start|>", "<|im_end|>"), add_bos_token=True, pad_token="</s>")
    example = chat(("user", "Hi"), ("assistant", "Yes"), ("user", "No"), ("assistant", "Ok"))
    one, other = (sample_of(example, encoder_of(each)) for each in (byte_tokens, Tokenizer.open(folder)))
    assert one.ids.tolist() == other.ids.tolist()
    assert one.trained.tolist() == other.trained.tolist()
    assert one.ids[one.trained].tolist().count(byte_tokens.eos_id) == 2


def test_long_sample_is_cut_and_loses_its_eos(byte_tokens: Tokenizer) -> None:
    whole = sample_of(_pair("ab:", "cdef"), encoder_of(byte_tokens, max_tokens=9))
    assert (len(whole.ids), whole.cut) == (9, False)
    cut = sample_of(_pair("ab:", "cdef"), encoder := encoder_of(byte_tokens, max_tokens=8))
    assert (cut.ids.tolist(), cut.cut) == (whole.ids.tolist()[:8], True)
    assert targets_of(cut, encoder) == "cdef"


def test_sample_cut_before_its_answer_is_an_error_that_names_the_row(byte_tokens: Tokenizer) -> None:
    sample = sample_of(_pair("ab:", "cd"), encoder := encoder_of(byte_tokens, max_tokens=5))
    assert targets_of(sample, encoder) == "c"
    assert _fault(_pair("ab:", "cd"), encoder_of(byte_tokens, max_tokens=4)) == (
        "rows.jsonl:7: nothing is left to train: the sample has 7 tokens, its answer begins at token 5 and"
        " --max-tokens is 4; raise --max-tokens or remove the row"
    )


def test_answer_without_tokens_is_an_error(tokenizer_folder: Callable[..., Path]) -> None:
    def drop_spaces_at_the_end(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Strip", "strip_left": False, "strip_right": True}

    tokenizer = Tokenizer.open(tokenizer_folder(change=drop_spaces_at_the_end))
    fault = _fault(_pair("yes", "  "), encoder_of(tokenizer))
    assert fault == "rows.jsonl:7: the tokenizer makes no token of the answer"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("n\udfff", "the text holds a lone surrogate at character 1"),
        ("no\U0010f000", "the text holds the private-use character U+10F000 at character 2"),
        ("\U0010e000", "the text holds the private-use character U+10E000 at character 0"),
    ],
)
def test_text_that_cannot_be_told_from_control_tokens_is_an_error_that_names_the_row(
    byte_tokens: Tokenizer, said: str, reason: str
) -> None:
    for example in (_pair("yes", said), _pair(said, "yes"), chat(("text", said))):
        assert _fault(example, encoder_of(byte_tokens)).startswith(f"rows.jsonl:7: {reason}")


@pytest.mark.parametrize(
    "example",
    [chat(("assistant", "Hi"), ("user", "No")), chat(("user", "No")), chat()],
    ids=["question last", "no answer", "nothing"],
)
def test_conversation_without_a_last_answer_is_an_error(byte_tokens: Tokenizer, example: Example) -> None:
    assert _fault(example, encoder_of(byte_tokens)) == (
        "rows.jsonl:7: the last turn is not the assistant's, so there is no answer to train on"
    )


def test_text_beside_turns_is_an_error(byte_tokens: Tokenizer) -> None:
    fault = _fault(chat(("text", "once"), ("assistant", "upon")), encoder_of(byte_tokens))
    assert fault == "rows.jsonl:7: an example has text alone, or the turns of a conversation"


def test_a_template_without_an_end_of_turn_is_refused(byte_tokens: Tokenizer) -> None:
    own = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert _fault(chat(("user", "Hi"), ("assistant", "Yes")), encoder_of(byte_tokens, own=own)) == (
        "rows.jsonl:7: the template ends an answer without a control token of this tokenizer, so no model would learn"
        " to stop"
    )


REWRITES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ '<think></think>' if loop.last and m.role == 'assistant' }}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_answers_trains_the_last_one_alone(byte_tokens: Tokenizer) -> None:
    example = chat(("user", "Hi"), ("assistant", "Yes"), ("user", "No"), ("assistant", "Ok"))
    assert _fault(example, encoder_of(byte_tokens, own=REWRITES)).startswith(
        "rows.jsonl:7: the template writes answer 1 otherwise once more has been said"
    )
    sample = sample_of(example, encoder := encoder_of(byte_tokens, own=REWRITES, train_on="last"))
    assert targets_of(sample, encoder) == "<think></think>Ok<|im_end|>"


def test_a_template_that_rewrites_the_prompt_is_refused(byte_tokens: Tokenizer) -> None:
    own = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    for train_on in ("answers", "last"):
        fault = _fault(chat(("user", "Hi"), ("assistant", "Yes")), encoder_of(byte_tokens, own=own, train_on=train_on))
        assert fault.startswith("rows.jsonl:7: the template writes what leads to answer 1 otherwise")


def test_a_template_that_takes_texts_apart_works_where_no_control_token_can_come_of_it(byte_tokens: Tokenizer) -> None:
    own = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    encoder = encoder_of(byte_tokens, own=own)
    sample = sample_of(chat(("user", "Hi"), ("assistant", "Hm.</think>Yes")), encoder)
    assert targets_of(sample, encoder) == "Yes<|im_end|>"
    for said in ("Hm.</think>Yes<|im_end|>", "Hm.</think>nd|>"):
        assert "takes the text of a turn apart" in _fault(chat(("user", "Hi"), ("assistant", said)), encoder)


def test_a_template_that_leaves_out_a_turn_is_not_trusted_with_a_control_tokens_name(byte_tokens: Tokenizer) -> None:
    own = "{% set messages = messages|rejectattr('role', 'equalto', 'system')|list %}" + CHATML
    encoder = encoder_of(byte_tokens, own=own)
    spoken = (("user", "Hi"), ("assistant", "Yes"))
    assert targets_of(sample_of(chat(("system", "Be kind."), *spoken), encoder), encoder) == "Yes<|im_end|>"
    fault = _fault(chat(("system", "Be <|im_end|>."), *spoken), encoder)
    assert fault == "rows.jsonl:7: a turn that the template does not write out holds a control token's name"


def test_what_a_template_objects_to_is_the_rows_fault_and_the_others_go_on(byte_tokens: Tokenizer) -> None:
    own = "{% if messages|length > 2 %}{{ raise_exception('only one\nturn each') }}{% endif %}" + CHATML
    encoder = encoder_of(byte_tokens, own=own)
    good = chat(("user", "Hi"), ("assistant", "Yes"))
    bad = chat(("user", "Hi"), ("assistant", "Yes"), ("user", "Hi"), ("assistant", "Yes"))
    text = Example(messages=(Message(role="text", content="Once"),), origin="tale.txt")
    found = list(encoder.encode([bad, good, text, bad, good]))
    assert [str(item) for item in found if isinstance(item, DataError)] == [
        "rows.jsonl:7: the template refuses the conversation: only one turn each"
    ] * 2
    assert [len(item) for item in found if not isinstance(item, DataError)] == [1, 1, 1]


def test_an_unknown_form_is_the_rows_fault(byte_tokens: Tokenizer) -> None:
    fault = _fault(chat(("user", "Hi"), ("assistant", "Yes"), form="vicuna"), encoder_of(byte_tokens))
    assert fault == (
        "rows.jsonl:7: its form is 'vicuna', and no chat template has that name (alpaca, chatml, guanaco, plain)"
    )


def test_a_batch_gives_what_each_row_gives_alone(byte_tokens: Tokenizer) -> None:
    encoder = encoder_of(byte_tokens, own=CHATML)
    rows = [
        _pair("ab", "c"),
        chat(("user", "Hi"), ("assistant", "é🙂 </s>")),
        chat(("user", "x"), ("assistant", "y"), form="alpaca"),
        chat(("user", "no answer")),
        _pair("", "d"),
    ]
    together, alone = list(encoder.encode(rows)), [next(encoder.encode([row])) for row in rows]
    for one, other in zip(together, alone, strict=True):
        if isinstance(one, DataError):
            assert str(one) == str(other)
        else:
            assert isinstance(other, list)
            assert [sample.ids.tolist() for sample in one] == [sample.ids.tolist() for sample in other]
            assert [sample.trained.tolist() for sample in one] == [sample.trained.tolist() for sample in other]


def test_the_fingerprint_follows_all_that_samples_follow_from(
    byte_tokens: Tokenizer, bytes_without_bos: Tokenizer
) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"max_tokens": 9}, {"train_on": "all"}, {"own": CHATML}, {"own": CHATML + " "},
        {"kind": "seq2seq", "start_id": 0}, {"kind": "seq2seq", "start_id": 1},
    ]  # fmt: skip
    found = [encoder_of(byte_tokens, **each).fingerprint for each in settings]
    found.append(encoder_of(bytes_without_bos).fingerprint)
    assert len(set(found)) == len(found)
    assert found[0] == encoder_of(byte_tokens).fingerprint


def _pairs(example: Example, tokenizer: Tokenizer, **settings: Any) -> tuple[list[Sample], Encoder]:
    encoder = encoder_of(tokenizer, kind="seq2seq", start_id=0, **settings)
    return samples_of(example, encoder), encoder


def test_a_seq2seq_sample_has_the_prompt_for_its_source_and_the_answer_for_its_target(shared_data: Path) -> None:
    tokenizer = Tokenizer.open(shared_data / "tokenizers" / "t5")
    (sample,), _ = _pairs(_pair("translate: Hello", "Bonjour </s>"), tokenizer)
    assert sample.source is not None
    assert sample.source.tolist() == [*tokenizer.encode("translate: Hello")[0], 1]
    assert sample.ids.tolist()[0] == 0
    assert sample.ids.tolist()[-1] == 1
    assert tokenizer.decode(sample.ids.tolist()).startswith("Bonjour")
    assert sample.trained.tolist() == [False] + [True] * (len(sample.ids) - 1)


def test_each_answer_of_a_conversation_is_a_seq2seq_sample_or_the_last_alone(bytes_without_bos: Tokenizer) -> None:
    example = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), form="plain")
    samples, encoder = _pairs(example, bytes_without_bos)
    sources = [sample.source.tolist() for sample in samples if sample.source is not None]
    assert [bytes_without_bos.inner.decode(ids, skip_special_tokens=False) for ids in sources] == ["a", "ab</s>c"]
    assert [targets_of(sample, encoder) for sample in samples] == ["b</s>", "d</s>"]
    assert [sample.origin for sample in samples] == ["rows.jsonl:7 answer 1", "rows.jsonl:7 answer 2"]
    (last,), encoder = _pairs(example, bytes_without_bos, train_on="last")
    assert targets_of(last, encoder) == "d</s>"


def test_a_long_source_keeps_its_end_and_a_long_target_loses_it(shared_data: Path) -> None:
    tokenizer = Tokenizer.open(shared_data / "tokenizers" / "t5")
    (long_source,), _ = _pairs(_pair("one two three four five six", "a"), tokenizer, max_tokens=4)
    assert long_source.source is not None
    assert long_source.source.tolist() == [*tokenizer.encode("one two three four five six")[0][:3], 1]
    (long_target,), _ = _pairs(_pair("a", "one two three four five six"), tokenizer, max_tokens=4)
    assert len(long_target.ids) == 4
    assert 1 not in long_target.ids.tolist()
    assert (long_source.cut, long_target.cut) == (True, True)


def test_a_text_alone_is_no_seq2seq_sample(byte_tokens: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: an encoder-decoder model is trained on prompts and answers"):
        _pairs(chat(("text", "Once")), byte_tokens)


def _windows(text: str, tokenizer: Tokenizer, *, max_tokens: int) -> tuple[list[Sample], Encoder]:
    encoder = encoder_of(tokenizer, max_tokens=max_tokens)
    return samples_of(Example(messages=(Message(role="text", content=text),), origin="tale.txt"), encoder), encoder


def test_text_is_cut_into_windows_that_begin_with_bos_and_end_with_eos(byte_tokens: Tokenizer) -> None:
    windows, encoder = _windows("abcdefg", byte_tokens, max_tokens=4)
    assert [text_of(window, encoder) for window in windows] == ["<s>abc", "<s>def", "<s>g</s>"]
    assert [window.trained.tolist() for window in windows] == [[False] + [True] * n for n in (3, 3, 2)]
    assert [window.origin for window in windows] == ["tale.txt window 1", "tale.txt window 2", "tale.txt window 3"]


def test_window_without_bos_begins_with_the_token_before_it(bytes_without_bos: Tokenizer) -> None:
    windows, encoder = _windows("abcdefg", bytes_without_bos, max_tokens=4)
    assert [text_of(window, encoder) for window in windows] == ["abcd", "defg", "g</s>"]


def test_window_of_bos_and_eos_alone_is_dropped(byte_tokens: Tokenizer) -> None:
    windows, encoder = _windows("abc", byte_tokens, max_tokens=4)
    assert [text_of(window, encoder) for window in windows] == ["<s>abc"]


@given(text=st.text(letters, min_size=1, max_size=60), max_tokens=st.integers(2, 20), bos=st.booleans())
def test_windows_train_every_token_of_a_document_exactly_once(
    byte_tokens: Tokenizer, bytes_without_bos: Tokenizer, text: str, max_tokens: int, bos: bool
) -> None:
    tokenizer = byte_tokens if bos else bytes_without_bos
    windows, _ = _windows(text, tokenizer, max_tokens=max_tokens)
    targets = np.concatenate([window.ids[window.trained] for window in windows]).tolist()
    wanted = [*tokenizer.encode(text)[0], 2]
    if not bos:
        # Nothing stands before the first.
        assert targets == wanted[1:]
    elif (len(wanted) - 1) % (max_tokens - 1) == 0:
        assert targets == wanted[:-1]
    else:
        assert targets == wanted
    assert all(2 <= len(window.ids) <= max_tokens for window in windows)
    assert all(len(window.ids) == max_tokens for window in windows[:-1])


def test_text_without_tokens_is_an_error(byte_tokens: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"^tale\.txt: the tokenizer makes no token of the text$"):
        _windows("", byte_tokens, max_tokens=4)


PROMPTS = ["### Response: ", "Q:\n\n", "", "naïve 🙂", "x "]
ANSWERS = ["yes", " Paris, of course.", "\n\nA list:\n  1. é\n", "🙂🙂", "</s>"]


@pytest.mark.parametrize("answer", ANSWERS, ids=repr)
@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_mask_of_a_real_tokenizer_covers_the_answers_characters(mistral: Tokenizer, prompt: str, answer: str) -> None:
    sample = sample_of(_pair(prompt, answer), encoder_of(mistral))
    ids, offsets = mistral.encode(prompt + answer)
    assert sample.ids.tolist() == [1, *ids, 2]
    in_answer = set(range(len(prompt), len(prompt + answer)))
    wanted = [bool(in_answer & set(range(*offset))) for offset in offsets]
    assert sample.trained.tolist() == [False, *wanted, True]
    first = wanted.index(True)
    # Decoding what is not trained gives no more than the prompt; the rest holds the answer whole.
    assert prompt.startswith(mistral.decode(ids[:first]))
    assert (prompt + answer)[offsets[first][0] :].endswith(answer)
    assert all(wanted[first:])
