"""Conversations against transformers: the same characters, and the same ids, from every real template we have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from qlora_pipe.data.encode import Encoder
from qlora_pipe.data.prompt import chat_prompt
from qlora_pipe.data.render import Renderer, Turn
from qlora_pipe.data.templates import Template, Templates
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import Example, Message, Role
from qlora_pipe.testing import byte_tokenizer
from tests.pipe.encoders import installed_templates

transformers = pytest.importorskip("transformers")
chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

NAMES = (
    "qwen2.5-instruct", "dolphin3-mistral-chatml", "molmo-qwen2-chatml", "llama-3.1-instruct", "chujiezheng/chatml",
    "chujiezheng/llama-3-instruct", "chujiezheng/zephyr", "chujiezheng/mistral-instruct", "chujiezheng/vicuna",
    "chujiezheng/alpaca", "chujiezheng/phi-3", "chujiezheng/qwen2.5-instruct",
)  # fmt: skip
SYSTEM: tuple[Role, str] = ("system", " You are kind. \n")
ASKED: list[tuple[Role, str]] = [
    ("user", "Hi, who are you?\n\n"), ("assistant", "  I am né 🙂.\nAnd you?"), ("user", "{{ 7 * 7 }}  <b>bold</b>")
]  # fmt: skip
ANSWERED: list[tuple[Role, str]] = [*ASKED, ("assistant", "It is 49 .")]


@pytest.fixture(scope="module")
def described(shared_data: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((shared_data / "chat_templates" / "chat_templates.json").read_text())
    return found


def test_every_template_is_tested(described: dict[str, dict[str, Any]]) -> None:
    assert sorted(described) == sorted(NAMES)


def _theirs(source: str, turns: list[tuple[Role, str]], *, asks: bool, variables: dict[str, str]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    (text,), _ = chat_template_utils.render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=asks, **variables
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", NAMES)
def test_every_real_template_renders_as_transformers_does(described: dict[str, dict[str, Any]], name: str) -> None:
    entry = described[name]
    variables = {key: entry[key] for key in ("bos_token", "eos_token") if entry[key] is not None}
    for source in filter(None, (entry["chat_template"], entry.get("chat_template_compact"))):
        renderer = Renderer(source, variables)
        for system in ([], [SYSTEM]):
            for turns, asks in ((ASKED, True), (ANSWERED, False), (ANSWERED[:2], False)):
                spoken = [*system, *turns]
                ours = renderer.text([Turn(*turn) for turn in spoken], add_generation_prompt=asks)
                assert ours == _theirs(source, spoken, asks=asks, variables=variables)


GADGETS = """
{%- generation -%}{{ messages[0].content }}{%- endgeneration -%}
    {% set ns = namespace(n=0, self=1) %}
{%- for i in range(9) %}{% if i == 3 %}{% continue %}{% endif %}{% if i > 5 %}{% break %}{% endif %}
    {%- set ns.n = ns.n + i -%}
{% endfor %}
{{ ns.n }} {{ messages[0]|tojson }} {{ messages|tojson(indent=2) }} {{ dict(a='<é>')|tojson(ensure_ascii=True) }}
  {# gone #}
{{ tools is none }} {{ documents is none }} {{ nothing is defined }} {{ strftime_now is defined }} {{ "%s" % 3 }}
"""


def test_all_that_transformers_offers_a_template_is_there() -> None:
    ours = Renderer(GADGETS, {}).text([Turn(*turn) for turn in ASKED], add_generation_prompt=False)
    assert ours == _theirs(GADGETS, ASKED, asks=False, variables={})


def _raw(shared_data: Path, name: str) -> tokenizers.Tokenizer:
    if name == "bytes":
        return byte_tokenizer()
    return tokenizers.Tokenizer.from_file(str(shared_data / name / "tokenizer.json"))


@pytest.fixture(scope="module", params=["bytes", "models/stories260K", "tokenizers/mistral", "tokenizers/t5"])
def model(
    request: pytest.FixtureRequest,
    shared_data: Path,
    described: dict[str, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, Any]:
    """A real tokenizer to which the control tokens of all templates were added, as we and as transformers open it."""
    folder = tmp_path_factory.mktemp("model")
    raw = _raw(shared_data, request.param)
    sources = "".join(entry["chat_template"] for entry in described.values())
    raw.add_special_tokens(
        sorted({"<s>", "</s>", "<|endoftext|>", "<|begin_of_text|>", *re.findall(r"<\|\w+\|>", sources)})
    )
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer.open(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_apply_chat_template(
    model: tuple[Tokenizer, Any], described: dict[str, dict[str, Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process for each rendering takes its time, and gives the same.
    monkeypatch.setattr(Templates, "_render_confined", Templates._render_here)
    tokenizer, peer = model
    entry = described[name]
    variables = {key: entry[key] for key in ("bos_token", "eos_token") if entry[key] is not None}
    source = entry.get("chat_template_compact") or entry["chat_template"]
    own = Template(name=name, source=source, installed=False)
    templates = Templates(chosen=None, own=own, installed={}, variables=variables)
    encoder = Encoder(tokenizer=tokenizer, max_tokens=4096, templates=templates)
    for system in ([], [SYSTEM]):
        spoken = [*system, *ANSWERED]
        messages = [{"role": role, "content": content} for role, content in spoken]
        example = Example(messages=tuple(Message(role=role, content=text) for role, text in spoken), origin="row")
        (samples,) = encoder.encode([example])
        assert isinstance(samples, list), samples
        given = {"chat_template": source, "return_dict": True, **variables}
        theirs = peer.apply_chat_template(messages, **given)["input_ids"]
        assert samples[0].ids.tolist() == theirs
        asked = chat_prompt([Turn(*turn) for turn in [*system, *ASKED]], templates=templates, tokenizer=tokenizer)
        assert asked.ids == peer.apply_chat_template(messages[:-1], add_generation_prompt=True, **given)["input_ids"]
        # The last thing that is trained is what generation stops at.
        assert int(samples[0].ids[samples[0].trained][-1]) in asked.stop_ids


@pytest.mark.parametrize("form", ["guanaco", "alpaca", "chatml", "plain"])
def test_others_read_the_adapters_template_as_we_trained_it(model: tuple[Tokenizer, Any], form: str) -> None:
    tokenizer, peer = model
    installed = installed_templates()
    templates = Templates(chosen=installed[form], own=None, installed=installed, variables=tokenizer.names)
    encoder = Encoder(tokenizer=tokenizer, max_tokens=4096, templates=templates)
    for spoken in ([SYSTEM, *ANSWERED], ANSWERED):
        example = Example(messages=tuple(Message(role=role, content=text) for role, text in spoken), origin="row")
        (samples,) = encoder.encode([example])
        assert isinstance(samples, list), samples
        messages = [{"role": role, "content": content} for role, content in spoken]
        theirs = peer.apply_chat_template(
            messages, chat_template=encoder.shared_template(example), eos_token="</s>", return_dict=True
        )
        assert samples[0].ids.tolist() == theirs["input_ids"]
