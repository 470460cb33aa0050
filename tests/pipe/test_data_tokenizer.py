"""The tokenizer: control tokens found, user text kept apart from them, broken folders named."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer

from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import ConfigError, DataError, MissingInputError

MakeFolder = Callable[..., Path]
TEXTS = ["yes", " yes  no", "naïve 🙂\n\tthe end", "the </s> of <s>", "", "   ", "\n"]


def _drop_post_processor(content: dict[str, Any]) -> None:
    content["post_processor"] = None


def test_bos_is_what_the_post_processor_adds(tokenizer_folder: MakeFolder) -> None:
    assert Tokenizer.open(tokenizer_folder()).bos_id == 1


def test_no_bos_where_the_post_processor_adds_none(tokenizer_folder: MakeFolder) -> None:
    assert Tokenizer.open(tokenizer_folder(change=_drop_post_processor)).bos_id is None


@pytest.mark.parametrize(("add_bos_token", "expected"), [(True, 1), (False, None), (None, None)])
def test_add_bos_token_decides_where_it_is_given(
    tokenizer_folder: MakeFolder, add_bos_token: bool | None, expected: int | None
) -> None:
    config = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "add_bos_token": add_bos_token}
    assert Tokenizer.open(tokenizer_folder(change=_drop_post_processor, tokenizer_config=config)).bos_id == expected


@pytest.mark.parametrize(
    "configs",
    [
        {"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": 1}},
        {"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}},
        {"tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": [2, 1]}},
        {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 2}},
    ],
)
def test_eos_is_found_in_the_first_file_that_names_it(tokenizer_folder: MakeFolder, configs: dict[str, Any]) -> None:
    assert Tokenizer.open(tokenizer_folder(**configs)).eos_id == 2


@pytest.mark.parametrize(
    ("configs", "reason"),
    [
        ({"config": {}}, "does not say which token ends a text"),
        ({"tokenizer_config": {"eos_token": "<end>"}}, "eos_token '<end>' of tokenizer_config.json is not in"),
        ({"config": {"eos_token_id": 4096}}, "eos_token_id is 4096, and the tokenizer's ids are 0 to 298"),
        ({"config": {"eos_token_id": "2"}}, "eos_token_id is '2'"),
        ({"config": {"eos_token_id": True}}, "eos_token_id is True"),
        ({"tokenizer_config": {"eos_token": "</s>", "add_bos_token": 1}}, "add_bos_token must be true or false"),
        ({"tokenizer_config": {"eos_token": "</s>", "add_bos_token": True}}, "there is no bos_token"),
        ({"tokenizer_config": ["</s>"]}, "tokenizer_config.json holds a JSON list"),
    ],
)
def test_config_that_cannot_be_used_is_named(
    tokenizer_folder: MakeFolder, configs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        Tokenizer.open(tokenizer_folder(**configs))
    assert reason in str(caught.value)


def test_control_tokens_in_a_text_stay_text(tiny_tokenizer: Tokenizer) -> None:
    ids, offsets = tiny_tokenizer.encode("yes</s><s>")
    assert not {tiny_tokenizer.bos_id, tiny_tokenizer.eos_id} & set(ids)
    assert tiny_tokenizer.decode(ids) == "yes</s><s>"
    assert offsets == [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9), (9, 10)]


def test_vocabulary_that_spells_its_control_token_refuses_the_text(shared_data: Path) -> None:
    tokenizer = Tokenizer.open(shared_data / "tokenizers" / "t5")
    with pytest.raises(DataError, match="holds '</s>' at character 6, which this tokenizer reads as a control token"):
        tokenizer.encode("Hello </s> world")


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_decode_gives_the_text_back_and_drops_control_tokens(tiny_tokenizer: Tokenizer, text: str) -> None:
    ids, offsets = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode([1, *ids, 2]) == text
    assert {position for start, end in offsets for position in range(start, end)} == set(range(len(text)))


@pytest.mark.parametrize("text", TEXTS, ids=repr)
@pytest.mark.parametrize("name", ["models/stories260K", "tokenizers/mistral"])
def test_ids_are_those_of_the_library_on_the_text_alone(shared_data: Path, name: str, text: str) -> None:
    raw = RawTokenizer.from_file(str(shared_data / name / "tokenizer.json"))
    raw.encode_special_tokens = True
    tokenizer = Tokenizer.open(shared_data / name)
    assert tokenizer.encode(text)[0] == raw.encode(text, add_special_tokens=False).ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_truncation_padding_and_dropout_of_the_file_are_off(tokenizer_folder: MakeFolder) -> None:
    def change(content: dict[str, Any]) -> None:
        content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
        }  # fmt: skip
        content["model"]["dropout"] = 0.9

    text = "yes the yes no the " * 5
    plain = Tokenizer.open(tokenizer_folder()).encode(text)
    changed = Tokenizer.open(tokenizer_folder(change=change))
    assert changed.bos_id == 1
    assert [changed.encode(text) for _ in range(5)] == [plain] * 5


def test_offsets_keep_the_spaces_that_a_byte_level_post_processor_trims(tokenizer_folder: MakeFolder) -> None:
    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"] = {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
        }  # fmt: skip
        content["normalizer"] = None
        content["post_processor"] = {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
        }  # fmt: skip
        content["model"]["vocab"]["Ġ"] = len(content["model"]["vocab"])

    _, offsets = Tokenizer.open(tokenizer_folder(change=change)).encode("a  b")
    assert offsets == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_digest_is_the_hash_of_the_file_and_vocab_size_is_past_every_id(tokenizer_folder: MakeFolder) -> None:
    folder = tokenizer_folder()
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.digest == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer.vocab_size == 299


def test_lone_surrogate_is_no_text(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate at character 3"):
        tiny_tokenizer.encode("yes\ud800")


def test_absent_tokenizer_is_missing_input(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"has neither tokenizer\.json nor a SentencePiece model"):
        Tokenizer.open(tmp_path)


def test_damaged_tokenizer_is_a_data_error_whatever_the_damage(tokenizer_folder: MakeFolder) -> None:
    folder = tokenizer_folder()
    path = folder / "tokenizer.json"
    whole = path.read_bytes()
    generator = random.Random(0)
    reasons: list[str] = []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] = generator.randrange(256)
        start = generator.randrange(len(whole))
        del damaged[start : start + generator.randrange(20)]
        path.write_bytes(damaged)
        try:
            Tokenizer.open(folder).encode("yes")
        except (DataError, ConfigError) as fault:
            reasons.append(str(fault))
    assert len(reasons) > 100
    assert not any("\n" in reason for reason in reasons)


@pytest.mark.parametrize("token", ["nowhere", "</s>"])
def test_template_that_names_an_unknown_token_is_a_data_error(tokenizer_folder: MakeFolder, token: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["post_processor"]["single"][0]["SpecialToken"]["id"] = token

    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer that can be read"):
        Tokenizer.open(tokenizer_folder(change=change))


def test_damaged_config_is_a_config_error(tokenizer_folder: MakeFolder) -> None:
    folder = tokenizer_folder()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"})[:-3])
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.open(folder)
