"""`preview`: rows as the tokens that are trained, and what would train wrongly."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from qlora_pipe.cli.preview import _line
from qlora_pipe.config import PreviewConfig
from qlora_pipe.data.batches import Stream
from qlora_pipe.data.encode import Sample
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.plugins import load_plugins
from qlora_pipe.stages.preview import Preview, Token, padding_share, preview, text_of
from qlora_pipe.testing import RunCli, tiny_checkpoint

pytest_plugins = ["qlora_pipe.testing.fixtures"]

ROWS = [
    {"prompt": "Say hi. ", "answer": "Hi!"},
    {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two\nthree"}]},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PIPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base")


def rows_of(tmp_path: Path, rows: Sequence[object], *, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def look(base: Path, spec: str, **settings: object) -> Preview:
    return preview(str(base), spec, PreviewConfig(**settings), manager=load_plugins())  # type: ignore[arg-type]


def trained_text(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens if token.trained)


def test_rows_are_shown_as_their_tokens_with_the_trained_ones_marked(base: Path, tmp_path: Path) -> None:
    found = look(base, f"jsonl:{rows_of(tmp_path, ROWS)}")
    first, second = found.shown
    assert "".join(token.text for token in first.tokens) == "<s>Say hi. Hi!</s>"
    assert (trained_text(first.tokens), trained_text(second.tokens)) == ("Hi!</s>", " Two\nthree</s>")
    assert [sample.origin for sample in found.shown] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert found.trained == sum(token.trained for sample in found.shown for token in sample.tokens)
    assert found.tokens == sum(len(sample.tokens) for sample in found.shown)
    assert found.faults == ()


def test_the_command_prints_brackets_where_there_is_no_terminal(run_cli: RunCli, base: Path, tmp_path: Path) -> None:
    done = run_cli("preview", "--base", base, "--data", f"jsonl:{rows_of(tmp_path, ROWS)}", "--rows", 1)
    assert done.exit_code == 0
    heading, line, _, *summary = done.stdout.splitlines()
    assert heading == "1  rows.jsonl:1   13 tokens, 4 trained"
    assert line == "<s>·S·a·y· ·h·i·.· ·[H·i·!·</s>]"
    assert [each.split()[0] for each in summary] == ["samples", "tokens", "lengths", "padding"]
    assert "2 of 2 rows" in summary[0]


def test_on_a_terminal_trained_tokens_are_green() -> None:
    tokens = [Token(id=1, text="a", trained=False), Token(id=2, text="b\n", trained=True)]
    shown = _line(tokens, coloured=True)
    assert "\x1b[32m\x1b[1mb\u21b5\x1b[0m" in shown
    assert shown.startswith("a")
    assert "[b" not in shown


def test_of_a_long_sample_the_middle_is_left_out() -> None:
    tokens = [Token(id=number, text=str(number), trained=number > 300) for number in range(1000)]
    shown = _line(tokens, coloured=False)
    assert " ... 600 tokens ... [800·" in shown
    assert shown.endswith("·999]")


def test_the_json_holds_what_is_printed(run_cli: RunCli, base: Path, tmp_path: Path) -> None:
    done = run_cli("preview", "--base", base, "--data", f"jsonl:{rows_of(tmp_path, ROWS)}", "--json")
    found = json.loads(done.stdout)
    assert [sample["origin"] for sample in found["shown"]] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert found["shown"][0]["tokens"][-1] == {"id": 2, "text": "</s>", "trained": True}


def test_cut_answers_are_counted_named_and_refused(run_cli: RunCli, base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": "a" * length} for length in (3, 40, 50, 60, 70)]
    path = rows_of(tmp_path, rows)
    done = run_cli("preview", "--base", base, "--data", f"jsonl:{path}", "--max-tokens", 20, "--rows", 0)
    assert done.exit_code == 65
    assert "4 samples cut at 20 tokens, where an answer's end is lost (raise --max-tokens): " in done.stderr
    assert "rows.jsonl:2, rows.jsonl:3, rows.jsonl:4 and 1 more" in done.stderr
    assert "samples   5 of 5 rows" in done.stdout


def test_rows_of_which_nothing_is_trained_are_counted_among_the_good(base: Path, tmp_path: Path) -> None:
    path = rows_of(tmp_path, [*ROWS, {"prompt": "p" * 90, "answer": "x"}, {"prompt": "p"}])
    (fault,) = look(base, f"jsonl:{path}", max_tokens=64).faults
    assert (fault.count, fault.of) == (2, "row")
    assert "rows.jsonl:3: nothing is left to train" in fault.named[0]
    assert 'rows.jsonl:4: field "answer" is missing' in fault.named[1]


def test_answers_that_nothing_ends_are_refused(run_cli: RunCli, base: Path, tmp_path: Path) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")
    done = run_cli("preview", "--base", base, "--data", f"jsonl:{rows_of(tmp_path, ROWS)}", "--template", template)
    assert done.exit_code == 65
    assert "so no model would learn to stop" in done.stderr


def test_a_text_need_not_end_in_each_window(base: Path, tmp_path: Path) -> None:
    (tmp_path / "tale.txt").write_text("once upon a time " * 9)
    found = look(base, f"text:{tmp_path / 'tale.txt'}", max_tokens=32)
    assert found.samples > 3
    assert found.faults == ()


def test_both_sides_of_an_encoder_decoder_model_are_shown(tmp_path: Path, run_cli: RunCli) -> None:
    base = tiny_checkpoint(tmp_path / "t5", family="t5")
    path = rows_of(tmp_path, ROWS[:1])
    done = run_cli("preview", "--base", base, "--data", f"jsonl:{path}")
    assert done.exit_code == 0, done.stderr
    heading, source, target, *_ = done.stdout.splitlines()
    assert heading.startswith("1  rows.jsonl:1   ")
    assert "tokens of source" in heading
    assert source.replace("·", "").startswith("Say hi.")
    assert target == "<pad>·[H·i·!·</s>]"
    assert "--pack" not in done.stdout


def test_the_padding_is_that_of_the_batches_that_are_trained_on(base: Path, tmp_path: Path) -> None:
    draws = np.random.default_rng(5)
    samples = [
        Sample(ids=np.ones(length, dtype=np.int32), trained=np.ones(length, dtype=np.bool_), origin="x")
        for length in draws.integers(2, 60, 203)
    ]
    lengths = np.array([len(sample.ids) - 1 for sample in samples])
    for pack in (False, True):
        config = PreviewConfig(batch_size=7, max_tokens=64, seed=3)
        stream = Stream(samples, seed=3, row_tokens=64 if pack else None)
        at = used = positions = 0
        while stream.place(at).epoch == 0:
            rows = next(count for count in range(7, 0, -1) if stream.place(at + count - 1).epoch == 0)
            batch = stream.batch(at, rows=rows)
            used, positions, at = used + batch.tokens, positions + batch.ids.numel(), at + rows
        assert padding_share([lengths], config, pack=pack) == pytest.approx(1 - used / positions, abs=1e-12)
    assert padding_share([lengths], config, pack=True) < 0.15 < padding_share([lengths], config, pack=False)


def test_preview_leaves_the_samples_where_finetune_finds_them(run_cli: RunCli, base: Path, tmp_path: Path) -> None:
    path = rows_of(tmp_path, ROWS * 4)
    assert run_cli("preview", "--base", base, "--data", f"jsonl:{path}").exit_code == 0
    kept = sorted((tmp_path / "cache" / "samples").iterdir())
    line = ["finetune", base, "--data", f"jsonl:{path}", "--out", tmp_path / "run", "--steps", 1, "--rank", 2]
    assert run_cli(*line).exit_code == 0
    assert sorted((tmp_path / "cache" / "samples").iterdir()) == kept


@pytest.mark.parametrize(("id_", "text"), [(2, "</s>"), (1, "<s>")])
def test_control_tokens_are_shown_as_they_are_written(base: Path, id_: int, text: str) -> None:
    assert text_of(id_, Tokenizer.open(base)) == text


def test_tokens_of_a_real_tokenizer_keep_their_spaces(shared_data: Path) -> None:
    tokenizer = Tokenizer.open(shared_data / "tokenizers" / "mistral")
    ids, _ = tokenizer.encode("Hello there, naïve world")
    assert "".join(text_of(each, tokenizer) for each in ids).lstrip() == "Hello there, naïve world"
