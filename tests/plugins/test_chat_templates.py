"""The forms that come with the project: each as it was published, each with an end after every answer."""

import json
from functools import cache
from pathlib import Path

import pytest

from qlora_pipe.chat_template import ChatTemplate
from qlora_pipe.data.render import Renderer, Turn
from qlora_pipe.errors import ConfigError
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.plugins import chat_templates, list_plugins, load_plugins

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
    " response that appropriately completes the request.\n\n### Instruction:\nAdd them.\n\n### Input:\n1 and 2\n\n"
    "### Response: "
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hello.\n\n### Response: "
)


@cache
def renderer(name: str, eos: str) -> Renderer:
    return Renderer(chat_templates(load_plugins())[name].source, {"eos_token": eos})


def render(name: str, *turns: tuple[str, str], eos: str = "</s>", asks: bool = False) -> str:
    return renderer(name, eos).text([Turn(*turn) for turn in turns], add_generation_prompt=asks)


def test_plain_sets_messages_end_to_end() -> None:
    assert render("plain", ("system", " a\n"), ("user", "b "), ("assistant", "\tc")) == " a\nb \tc</s>"
    assert render("plain", ("user", "b "), asks=True) == "b "


@pytest.mark.parametrize(
    ("asked", "prompt"), [("Add them.\n\n### Input:\n1 and 2", WITH_INPUT), ("Say hello.", WITHOUT_INPUT)]
)
def test_alpaca_has_its_two_published_prompts(asked: str, prompt: str) -> None:
    assert render("alpaca", ("user", asked), asks=True) == prompt
    assert render("alpaca", ("user", asked), ("assistant", "3")) == f"{prompt}3</s>"


def test_guanaco_gives_back_the_rows_that_its_text_form_has(shared_data: Path) -> None:
    path = shared_data / "datasets" / "oasst1" / "guanaco_text_300_derived.jsonl"
    rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(rows) == 300
    for text in rows:
        parts = text.removeprefix("### Human: ").replace(" ### Human: ", " ### Assistant: ").split(" ### Assistant: ")
        turns = [("assistant" if number % 2 else "user", said) for number, said in enumerate(parts)]
        assert render("guanaco", *turns, eos="") == text


def test_guanaco_asks_where_its_rows_answer() -> None:
    assert render("guanaco", ("system", "Be kind."), ("user", "Hi"), asks=True) == (
        "Be kind.\n### Human: Hi ### Assistant:"
    )


@pytest.mark.parametrize(("eos", "end"), [("<|im_end|>", "<|im_end|>"), ("</s>", "<|im_end|></s>")])
def test_chatml_ends_answers_with_eos_as_well_where_that_is_another_token(eos: str, end: str) -> None:
    assert render("chatml", ("user", "Hi"), ("assistant", "Yes"), eos=eos) == (
        f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes{end}\n"
    )
    assert render("chatml", ("user", "Hi"), asks=True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


class Vicuna:
    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def register_chat_templates(self) -> list[ChatTemplate]:
        return [ChatTemplate(name=self.name, help="USER: and ASSISTANT:", source="{{ messages }}")]


def test_a_plugin_brings_a_template_and_is_listed() -> None:
    manager = load_plugins(Vicuna("vicuna"))
    assert list(chat_templates(manager)) == ["alpaca", "chatml", "guanaco", "plain", "vicuna"]
    listed = [entry for entry in list_plugins(manager) if entry.kind == "chat template"]
    assert [entry.name for entry in listed] == ["alpaca", "chatml", "guanaco", "plain", "vicuna"]
    assert listed[-1].help == "USER: and ASSISTANT:"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("auto", "a plugin brings a chat template named 'auto', which --template reads otherwise"),
        ("x.jinja", "a plugin brings a chat template named 'x.jinja', which --template reads otherwise"),
    ],
)
def test_a_name_that_is_taken_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        chat_templates(load_plugins(Vicuna(name)))


def test_two_templates_of_one_name_are_refused_by_that_name_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"alpaca", "guanaco"} <= chat_templates(load_plugins(Vicuna("plain"))).keys() - {"plain"}
    assert "neither can be used: two plugins bring the chat template 'plain'" in capsys.readouterr().err
