"""Prompts: what a model is asked begins as its samples did, and ends where their answers began."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_pipe.cli import execute
from qlora_pipe.data.prompt import chat_prompt, plain_prompt
from qlora_pipe.data.render import Turn
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import DataError
from qlora_pipe.testing import tiny_checkpoint
from tests.pipe.encoders import byte_folder, chat, encoder_of, sample_of

MakeFolder = Callable[..., Path]
# It writes a space before an answer, and half of the tokenizers put that into the answer's first token.
SPACED = (
    "{% for m in messages %}{{ 'the: ' if m.role == 'assistant' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}{{ 'the: ' }}{% endif %}"
)


@pytest.mark.parametrize("own", [None, SPACED])
def test_a_prompt_holds_the_ids_that_stood_before_the_answer(tiny_tokenizer: Tokenizer, own: str | None) -> None:
    encoder = encoder_of(tiny_tokenizer, own=own)
    sample = sample_of(chat(("system", "no"), ("user", "yes no"), ("assistant", "yes")), encoder)
    asked = [Turn("system", "no"), Turn("user", "yes no")]
    prompt = chat_prompt(asked, templates=encoder.templates, tokenizer=tiny_tokenizer)
    first = sample.trained.tolist().index(True)
    assert prompt.ids == sample.ids.tolist()[:first]
    assert prompt.stop_ids == {tiny_tokenizer.eos_id}


def test_a_turn_ends_with_the_templates_end_of_turn_as_well(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(byte_folder(tmp_path, special=("<|im_start|>", "<|im_end|>")))
    templates = encoder_of(tokenizer, own=encoder_of(tokenizer).templates.installed["chatml"].source).templates
    prompt = chat_prompt([Turn("user", "Hi <|im_end|>")], templates=templates, tokenizer=tokenizer)
    end = tokenizer.inner.token_to_id("<|im_end|>")
    assert prompt.stop_ids == {end, tokenizer.eos_id}
    assert prompt.ids.count(end) == 1


def test_a_template_that_cannot_be_trained_can_be_asked(tiny_tokenizer: Tokenizer) -> None:
    own = SPACED.replace("{{ 'the: ' }}", "{{ 'the: no ' }}")
    encoder = encoder_of(tiny_tokenizer, own=own)
    prompt = chat_prompt([Turn("user", "yes")], templates=encoder.templates, tokenizer=tiny_tokenizer)
    assert prompt.ids == tiny_tokenizer.encode("yesthe: no ")[0]


def test_what_the_template_refuses_is_said(tiny_tokenizer: Tokenizer) -> None:
    encoder = encoder_of(tiny_tokenizer, own="{{ raise_exception('no') }}")
    with pytest.raises(DataError, match="cannot be used: the template refuses the conversation: no"):
        chat_prompt([Turn("user", "yes")], templates=encoder.templates, tokenizer=tiny_tokenizer)


def test_a_plain_prompt_is_the_text_after_bos(tiny_tokenizer: Tokenizer, tokenizer_without_bos: Tokenizer) -> None:
    assert plain_prompt("yes", tiny_tokenizer).ids == [1, *tiny_tokenizer.encode("yes")[0]]
    assert plain_prompt("yes", tokenizer_without_bos).ids == tokenizer_without_bos.encode("yes")[0]


def test_generate_asks_through_the_template(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", str(shared_data / "models" / "stories260K"), "--prompt", "Once upon a", "--max-new-tokens", "9"]
    assert execute(line) == 0
    plain = capsys.readouterr().out
    assert execute([*line, "--chat", "--template", "plain"]) == 0
    assert capsys.readouterr().out == plain.lstrip()
    assert execute([*line, "--chat"]) == 0
    assert capsys.readouterr().out not in (plain, plain.lstrip())


def test_generate_takes_the_adapters_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ raise_exception('the base') }}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    line = ["finetune", str(base), "--data", f"jsonl:{tmp_path / 'rows.jsonl'}", "--steps", "1", "--rank", "2"]
    assert execute([*line, "--out", str(tmp_path / "run"), "--template", "chatml"]) == 0
    asked = ["generate", str(base), "--prompt", "a", "--chat", "--max-new-tokens", "2"]
    assert execute([*asked, "--adapter", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert execute(asked) == 65
    assert "the template refuses the conversation: the base" in capsys.readouterr().err
    assert execute(["merge", str(base), str(tmp_path / "run"), str(tmp_path / "merged"), "--min-retention", "0"]) == 0
    carried = (tmp_path / "run/final/chat_template.jinja").read_text()
    assert (tmp_path / "merged/chat_template.jinja").read_text() == carried


def test_system_and_template_belong_to_a_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    for more in (["--system", "x"], ["--template", "chatml"]):
        assert execute(["generate", str(base), "--prompt", "a", *more]) == 2
        assert "belong to a conversation: add --chat." in capsys.readouterr().err
