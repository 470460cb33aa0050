"""Damaged chat templates: whatever is wrong with one, it renders or ends in one sentence."""

import json
import random
from pathlib import Path

import pytest

from qlora_pipe.data.render import Renderer, TemplateRefusal, Turn

TURNS = [
    Turn("system", "Be kind."),
    Turn("user", "Hi"),
    Turn("assistant", "Yes"),
    Turn("user", "a"),
    Turn("assistant", "b"),
]
ODD = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "'",
    '"',
    "|",
    ".",
    "[",
    "]",
    "(",
    ")",
    "-",
    "9" * 50,
    "\\",
    "\n",
    "é",
    "\ud800",
    "\x00",
]
ODD += [
    "loop",
    "messages",
    "not ",
    "1/0",
    "**9",
    "{% raw %}",
    "{% for x in messages %}",
    "{% endfor %}",
    "|tojson",
    "|random",
]
ROUNDS = 600


# Jinja decodes texts as Python does, which warns of "\\h".
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_a_damaged_template_renders_or_says_in_one_line_what_is_wrong(shared_data: Path) -> None:
    described = json.loads((shared_data / "chat_templates" / "chat_templates.json").read_text())
    sources = [entry["chat_template"] for entry in described.values()]
    draws = random.Random(0)
    refused: list[str] = []
    rendered = 0
    for _ in range(ROUNDS):
        source = draws.choice(sources)
        for _ in range(draws.randrange(1, 4)):
            start = draws.randrange(len(source))
            source = source[:start] + draws.choice(["", draws.choice(ODD)]) + source[start + draws.randrange(4) :]
        try:
            found = Renderer(source, {"eos_token": "</s>"}).conversation(TURNS, train_on="answers")
        except TemplateRefusal as fault:
            refused.append(str(fault))
        else:
            rendered += 1
            for answer in found.answers:
                assert 0 <= answer.start < answer.end <= len(found.text)
            for span in found.contents or []:
                assert found.text[span.start : span.end]
    assert all("\n" not in reason and len(reason) < 400 for reason in refused)
    assert min(len(refused), rendered) > ROUNDS // 10
