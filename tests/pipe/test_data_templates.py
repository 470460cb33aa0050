"""Which template is chosen, where a checkpoint's own is found, and what a stranger's may not do."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe.confined import ConfinedError, run_confined
from qlora_pipe.data import templates
from qlora_pipe.data.render import Rendered, Turn
from qlora_pipe.data.templates import Template, Templates, checkpoint_template
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import ConfigError, DataError, MissingInputError
from qlora_pipe.plugins import load_plugins
from tests.pipe.encoders import byte_folder, encoder_of

TURNS = [Turn("user", "Hi"), Turn("assistant", "Yes")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return byte_folder(tmp_path / "model")


def _open(folder: Path, choice: str = "auto") -> Templates:
    return Templates.open(folder, Tokenizer.open(folder), choice=choice, manager=load_plugins())


def _configured(folder: Path, template: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


def test_the_jinja_file_comes_before_the_configs(folder: Path) -> None:
    assert checkpoint_template(folder) is None
    found = []
    _configured(folder, "one")
    found.append(checkpoint_template(folder))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "two"}))
    found.append(checkpoint_template(folder))
    (folder / "chat_template.jinja").write_text("three")
    found.append(checkpoint_template(folder))
    assert [template.source for template in found if template] == ["one", "two", "three"]
    assert [template.installed for template in found if template] == [False] * 3


@pytest.mark.parametrize(
    ("template", "source"),
    [
        ([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}], "b"),
        ([{"name": "rag", "template": "a"}], "a"),
    ],
)
def test_of_named_templates_the_default_or_the_only_one_is_meant(folder: Path, template: Any, source: str) -> None:
    _configured(folder, template)
    found = checkpoint_template(folder)
    assert found is not None
    assert found.source == source


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ([{"name": "a", "template": "a"}, {"name": "b", "template": "b"}], "has several chat templates (a, b)"),
        ([], "has several chat templates ()"),
        (7, "chat_template must be a text"),
        ([{"name": "default", "template": 7}], "chat_template must be a text"),
        ("x" * (2**16 + 1), "the chat template is longer than 64 KiB"),
    ],
)
def test_an_unusable_template_of_a_checkpoint_is_a_config_error(folder: Path, template: Any, reason: str) -> None:
    _configured(folder, template)
    with pytest.raises(ConfigError) as caught:
        checkpoint_template(folder)
    assert reason in str(caught.value)
    assert str(folder) in str(caught.value)


def test_auto_takes_the_rows_form_then_the_checkpoints_own_then_guanaco(folder: Path) -> None:
    assert _open(folder).find(None).name == "guanaco"
    _configured(folder, "own")
    assert _open(folder).find(None).source == "own"
    assert _open(folder).find("alpaca").name == "alpaca"
    with pytest.raises(DataError, match="its form is 'nothing'"):
        _open(folder).find("nothing")


def test_a_choice_holds_for_every_row(folder: Path, tmp_path: Path) -> None:
    _configured(folder, "own")
    (tmp_path / "mine.jinja").write_text("mine")
    for choice, source in (("checkpoint", "own"), (str(tmp_path / "mine.jinja"), "mine")):
        found = _open(folder, choice)
        assert [found.find(form).source for form in (None, "plain", "nothing")] == [source] * 3
        assert found.sources == [("", source)]
    assert _open(folder, "chatml").find("plain").name == "chatml"


@pytest.mark.parametrize(
    ("choice", "fault", "reason"),
    [
        ("checkpoint", ConfigError, "has no chat template; choose another --template: alpaca, chatml, guanaco, plain."),
        ("vicuna", ConfigError, r"no chat template named 'vicuna' \(installed: alpaca, chatml, guanaco, plain\)"),
        ("/nowhere/x.jinja", MissingInputError, "there is no chat template at /nowhere/x.jinja"),
    ],
)
def test_a_choice_that_there_is_not_is_an_error(folder: Path, choice: str, fault: type[Exception], reason: str) -> None:
    with pytest.raises(fault, match=reason):
        _open(folder, choice)


def test_a_file_that_is_no_text_or_too_long_is_an_error(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is not UTF-8 text\.$"):
        _open(folder)
    path.write_bytes(b"x" * (2**16 + 1))
    with pytest.raises(ConfigError, match="longer than 64 KiB"):
        _open(folder)
    path.write_bytes(b"x" * 2**16)
    assert _open(folder).own is not None


def _render(source: str, conversations: list[list[Turn]] = [TURNS], *, installed: bool = False) -> list[Rendered | str]:  # noqa: B006
    found = Templates(chosen=None, own=None, installed={}, variables={"eos_token": "</s>"})
    template = Template(name="bad.jinja", source=source, installed=installed)
    return list(found.render(template, conversations, train_on="answers"))


def _refused(source: str) -> str:
    with pytest.raises(ConfinedError) as caught:
        _render(source)
    return str(caught.value)


def test_a_stranger_renders_what_a_plugin_does_row_by_row() -> None:
    source = "{% for m in messages %}{{ m.role ~ m.content|trim ~ eos_token }}{% endfor %}"
    conversations = [[Turn("user", f"{number} é\U0001f642\n")] * (number % 7) + TURNS for number in range(500)]
    conversations.append([Turn("user", "y" * 300_000), Turn("assistant", "z")])
    here, there = (_render(source, conversations, installed=installed) for installed in (True, False))
    assert here == there
    assert all(isinstance(item, Rendered) for item in here)


@pytest.mark.parametrize("limit", ["_MOST_TURNS", "_MOST_CHARACTERS"])
def test_rows_are_shared_out_to_several_processes_in_their_order(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(templates, limit, 80)
    conversations = [[Turn("user", f"{number:0{number % 50}}"), *TURNS] for number in range(30)]
    parts: list[int] = []

    def counted(task: str, request: dict[str, Any], **details: Any) -> None:
        parts.append(len(request["conversations"]))
        run_confined(task, request, **details)

    monkeypatch.setattr(templates, "run_confined", counted)
    source = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    found = _render(source, conversations)
    assert sum(parts) == 30
    assert 3 < len(parts) < 30
    assert [item.text if isinstance(item, Rendered) else item for item in found] == [
        "".join(turn.content for turn in turns) + "</s>" for turns in conversations
    ]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more than 1 s of computing",
        ),
        ("{{ 'a' * 10**9 }}", "it needs more than the 512 MiB of memory that it may use"),
        ("{{ '%1000000000d' % 1 }}", "it needs more than the 512 MiB of memory that it may use"),
        ("{{ x" + "|upper" * 9000 + " }}", "it is nested too deeply (RecursionError)"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "it is nested too deeply (RecursionError)"),
        ("{{ " + "9" * 5000 + " }}", "it cannot be compiled (ValueError: Exceeds the limit (4300 digits)"),
        ("{% if %}", "line 1: Expected an expression, got 'end of statement block'"),
        ("{{ 'no end }}", 'line 1: unexpected char "\'" at 3'),
    ],
    ids=["nested loop", "long text", "wide number", "filters", "brackets", "digits", "no condition", "open text"],
)
def test_a_template_that_takes_too_much_or_is_none_ends_in_one_sentence(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "LIMITS", dataclasses.replace(templates.LIMITS, cpu_seconds=1))
    said = _refused(source)
    assert said.startswith("the chat template bad.jinja cannot be used: ")
    assert reason in said
    assert said.endswith(".")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion depth exceeded"),
        ("{{ range(10**9)|list }}", "OverflowError: Range too big"),
        ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "the template writes more than 4,194,304 characters"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append' of 'list' object is unsafe"),
        ("{% set _ = namespace(_x=1) %}", "SecurityError: a namespace keeps no name that begins with an underscore"),
        ("{% include 'x' %}", "TypeError: no loader for this environment specified"),
        ("{{ nothing.there }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ raise_exception('no\nsuch role') }}", "the template refuses the conversation: no such role"),
    ],
)
def test_what_a_template_does_to_a_row_is_said_of_the_row(source: str, reason: str) -> None:
    for installed in (False, True):
        (said,) = _render(source, installed=installed)
        assert isinstance(said, str)
        assert reason in said
        assert "\n" not in said


def test_chance_and_the_day_are_the_same_every_time() -> None:
    source = "{{ range(1000)|random }} {{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    found = [_render(source, [TURNS, TURNS]) for _ in range(2)]
    (one, other), again = found
    assert one == other
    assert again == [one, other]
    assert isinstance(one, Rendered)
    assert one.text.split()[1] == "2024-07-26HiYes"


def test_a_broken_template_that_is_not_asked_for_is_left_alone(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    assert _open(folder, "plain").find(None).name == "plain"


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"[]", b"[1]", b"{}", b"[null]", b'[["a", [], []], ["b", [], []]]', b'[["a", [[0, 0, 2]], []]]',
        b'[["a", [[2, 0, 1]], []]]', b'[["a", [[0, 1, 0]], []]]', b'[["a", [[0, -1, 0]], []]]', b'[[7, [], []]]',
        b'[["ab", [[0, 1, 2], [1, 0, 1]], []]]', b'[["a", [], [[0, true, 1]]]]', b'[["a", [], 3]]', b"[" * 100_000,
        b'[["a", [["0", 0, 1]], []]]', b'[["a", [[0, 0]], []]]', b'[{"text": "a"}]', b"\xff",
    ],
)  # fmt: skip
def test_an_answer_of_the_process_that_is_no_rendering_is_not_believed(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "run_confined", lambda *_, write, **__: write(answer))
    with pytest.raises(DataError, match=r"cannot be used: the process that renders it gave no rendering\.$"):
        _render("{{ 1 }}")


def test_a_reason_that_the_process_gives_is_fit_to_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "run_confined", lambda *_, write, **__: write(b'["a \\u001b[31m red\\nline"]'))
    assert _render("{{ 1 }}") == ["a ?[31m red?line"]


def test_nothing_is_rendered_where_there_is_nothing() -> None:
    assert _render("{{ 1 }}", []) == []


def test_a_turn_of_every_kind_keeps_its_place(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(byte_folder(tmp_path))
    conversation = [Turn("system", " a "), Turn("user", ""), Turn("assistant", "\nb"), *TURNS]
    known = encoder_of(tokenizer).templates
    (found,) = known.render(known.find("plain"), [conversation], train_on="answers")
    assert isinstance(found, Rendered)
    assert found.text == " a \nb</s>HiYes</s>"
    assert found.contents is not None
    assert [(span.message, found.text[span.start : span.end]) for span in found.contents] == [
        (0, "a"), (2, "b"), (3, "Hi"), (4, "Yes")
    ]  # fmt: skip
    assert [found.text[answer.start : answer.end] for answer in found.answers] == ["\nb</s>", "Yes</s>"]
