"""Control tokens by their signs: put where a template wrote them, and found again at their places."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from qlora_pipe.data.control import SIGNS, ControlTokens
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import ConfigError
from tests.pipe.encoders import byte_folder


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> ControlTokens:
    folder = byte_folder(tmp_path_factory.mktemp("control"), special=("<a>", "<a><b>", "</a>", "ab"))
    return ControlTokens(Tokenizer.open(folder))


@given(st.lists(st.sampled_from(["<a>", "<b>", "</a>", "ab", "<", "a", ">", "/", "</s>", "é", " "]), max_size=12))
def test_what_a_template_writes_is_read_as_the_library_reads_it(control: ControlTokens, parts: list[str]) -> None:
    text = "".join(parts)
    (tokens,) = control.encode([control.sign(text, []).text])
    raw = RawTokenizer.from_str(control.tokenizer.inner.to_str())
    assert tokens.ids.tolist() == raw.encode(text, add_special_tokens=False).ids


@given(
    st.lists(st.tuples(st.sampled_from(["<a>", "x</a>", "<", "ab", "a", "</s>"]), st.booleans()), max_size=10),
)
def test_what_is_said_is_never_a_control_token(control: ControlTokens, parts: list[tuple[str, bool]]) -> None:
    text, contents = "", []
    for part, is_said in parts:
        if is_said:
            contents.append((len(text), len(text) + len(part)))
        text += part
    signed = control.sign(text, contents)
    assert all(not (start < past and end > first) for first, past in signed.controls for start, end in contents)
    for start, end in contents:
        assert signed.text[signed.place(start) : signed.place(end)] == text[start:end]
    (tokens,) = control.encode([signed.text])
    ids = {control.tokenizer.inner.token_to_id(name) for name in control.tokenizer.control}
    assert sum(token in ids for token in tokens.ids.tolist()) == len(signed.controls)


def test_the_closing_tokens_are_the_first_and_those_that_follow_at_once(control: ControlTokens) -> None:
    text = "<a>yes<a></s>\n</s>"
    signed = control.sign(text, [(3, 6)])
    assert signed.closing(6, len(text)) == (6, 13)
    assert signed.closing(13, len(text)) == (14, 18)
    assert signed.closing(6, 8) is None
    assert signed.text[signed.place(6) : signed.place(13)] == signed.text[4:6]


def test_a_token_that_only_the_config_calls_special_is_one(tokenizer_folder: Callable[..., Path]) -> None:
    def drop_eos(content: dict[str, Any]) -> None:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "</s>"]

    tokenizer = Tokenizer.open(tokenizer_folder(change=drop_eos))
    control = ControlTokens(tokenizer)
    (tokens,) = control.encode([control.sign("yes</s>", []).text])
    assert tokens.ids.tolist()[-1] == tokenizer.eos_id == 2
    (tokens,) = control.encode([control.sign("yes</s>", [(0, 7)]).text])
    assert 2 not in tokens.ids.tolist()


def test_merges_that_would_spell_a_control_token_are_left_out(tokenizer_folder: Callable[..., Path]) -> None:
    def spell(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["</"] = max(vocabulary.values()) + 1
        vocabulary["</s"] = max(vocabulary.values()) + 1
        content["model"]["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]

    tokenizer = Tokenizer.open(tokenizer_folder(change=spell))
    assert 2 in tokenizer.inner.encode("yes</s>", add_special_tokens=False).ids
    control = ControlTokens(tokenizer)
    (tokens,) = control.encode([control.sign("yes</s>", [(0, 7)]).text])
    assert 2 not in tokens.ids.tolist()
    assert tokenizer.inner.id_to_token(int(tokens.ids[-2])) == "</s"


def test_more_control_tokens_than_signs_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(byte_folder(tmp_path))
    many = dataclasses.replace(tokenizer, control=frozenset(map(str, range(len(SIGNS) + 1))))
    with pytest.raises(ConfigError, match="the tokenizer has 4,095 control tokens, and 4,094 can be told apart"):
        ControlTokens(many)


def test_the_flags_of_an_added_token_stay(tmp_path: Path) -> None:
    folder = byte_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(
        {"id": 259, "content": "<m>", "single_word": False, "lstrip": True, "rstrip": True, "normalized": False,
         "special": True}
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    control = ControlTokens(Tokenizer.open(folder))
    (tokens,) = control.encode([control.sign("a  <m>  b", []).text])
    assert tokens.ids.tolist()[1:-1] == [259]
