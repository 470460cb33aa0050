"""Finetune as a user meets it: what it trains, what it writes, and what it says of input that it cannot use."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from qlora_formats.commit import write_file
from qlora_formats.tensorfile import TensorFile
from qlora_pipe.artifacts import Adapter
from qlora_pipe.cli import execute
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.testing import filled, tiny_checkpoint, tiny_weights
from qlora_plugins.llama import register_architectures
from tests.pipe.runs import SETTINGS, contents, finetune_line, metrics, outcome, small_checkpoint, write_rows

KEYS = {"step", "loss", "learning_rate", "grad_norm", "tokens", "seconds"}


@pytest.fixture(autouse=True)
def _restore_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "base")


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    assert execute(["quantize", str(checkpoint), str(checkpoint.parent / "store")]) == 0
    return checkpoint.parent / "store"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def train(base: Path, rows: Path, out: Path, **settings: Any) -> Path:
    """Fine-tune to the end, and give the run."""
    assert execute(finetune_line(base, rows, out, **settings)) == 0
    return out


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the one sentence of a command that fails."""
    capsys.readouterr()
    code = execute(line)
    said = capsys.readouterr()
    assert said.out == ""
    sentences = [text for text in said.err.splitlines() if not text.startswith(("note: ", "before ", "step "))]
    assert len(sentences) == 1, said.err
    assert sentences[0].startswith("error: ")
    return code, sentences[0]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    file = TensorFile.open(run / "final" / "adapter_model.safetensors")
    return {name: file.tensor(name) for name in file.infos}


def losses_by_hand(checkpoint: Path, rows: Path) -> list[torch.Tensor]:
    """Per row, the base's loss at each token of the answer and at the end, one row at a time."""
    config = json.loads((checkpoint / "config.json").read_text())
    model = filled(register_architectures()[0], config, tiny_weights(config, seed=0), dtype=torch.float32)
    tokenizer, found = Tokenizer.open(checkpoint), []
    for row in map(json.loads, rows.read_text().splitlines()):
        prompt, answer = tokenizer.encode(row["prompt"])[0], tokenizer.encode(row["answer"])[0]
        ids = torch.tensor([tokenizer.bos_id, *prompt, *answer, tokenizer.eos_id])
        logits = model(ids[None, :-1])[0, len(prompt) :]
        found.append(functional.cross_entropy(logits, ids[1 + len(prompt) :], reduction="none"))
    return found


def test_the_loss_is_the_mean_over_the_answers_tokens_and_their_ends_and_nothing_else(
    checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    by_hand = losses_by_hand(checkpoint, rows)
    out = train(checkpoint, rows, tmp_path / "run", steps=1, batch_size=13, accumulate=1, held_out=0)
    assert metrics(out)[0]["loss"] == pytest.approx(float(torch.cat(by_hand).mean()), abs=1e-6)
    # Which says nothing unless rows of other lengths have other losses.
    assert abs(float(torch.stack([loss.mean() for loss in by_hand]).mean()) - metrics(out)[0]["loss"]) > 1e-3


def test_a_window_is_worth_the_same_however_it_is_split(store: Path, rows: Path, tmp_path: Path) -> None:
    whole, *split = (
        train(store, rows, tmp_path / f"{size}", batch_size=size, accumulate=12 // size, dropout=0)
        for size in (12, 4, 3, 1)
    )
    for run in split:
        for ours, theirs in zip(metrics(run), metrics(whole), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
            assert ours["tokens"] == theirs["tokens"]
        for name, tensor in adapter(run).items():
            torch.testing.assert_close(tensor, adapter(whole)[name], rtol=0, atol=1e-6)


def test_metrics_hold_one_object_a_step_with_the_losses_that_were_measured(
    store: Path, rows: Path, tmp_path: Path
) -> None:
    found = metrics(train(store, rows, tmp_path / "run", steps=5, warmup_steps=4))
    assert [step["step"] for step in found] == [1, 2, 3, 4, 5]
    assert found[0].keys() == KEYS | {"eval_loss_start"}
    assert [step.keys() - KEYS for step in found[1:]] == [{"eval_loss"}, set(), {"eval_loss"}, {"eval_loss"}]
    assert found[-1]["eval_loss"] < found[0]["eval_loss_start"]
    assert [step["learning_rate"] for step in found] == pytest.approx([0.00125, 0.0025, 0.00375, 0.005, 0.005])
    assert all(step["grad_norm"] > 0 and step["seconds"] > 0 and step["tokens"] > 0 for step in found)


def test_the_resolved_config_makes_the_same_run_again(store: Path, rows: Path, tmp_path: Path) -> None:
    first = train(store, rows, tmp_path / "first")
    assert execute(["finetune", str(first / "config.resolved.yaml"), "--out", str(tmp_path / "second")]) == 0
    assert outcome(first) == outcome(tmp_path / "second")
    with_eval = train(store, rows, tmp_path / "third", eval_data=f"jsonl:{rows}", held_out=None)
    assert execute(["finetune", str(with_eval / "config.resolved.yaml"), "--out", str(tmp_path / "fourth")]) == 0
    assert outcome(with_eval) == outcome(tmp_path / "fourth")


def test_a_finished_run_is_left_as_it_is(
    store: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(store, rows, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}, contents(out)
    capsys.readouterr()
    assert execute(finetune_line(store, rows, out, save_every=1)) == 0
    said = capsys.readouterr()
    assert said.out == f"{out / 'final'}\n"
    assert "already done" in said.err
    assert ({path: path.stat().st_mtime_ns for path in out.rglob("*")}, contents(out)) == before


def test_other_settings_are_refused_whether_the_run_has_ended_or_not(
    store: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(store, rows, tmp_path / "run")
    before = contents(out)
    code, sentence = refused(finetune_line(store, rows, out, rank=5), capsys)
    assert code == 73
    assert "rank was 3 and is now 5" in sentence
    assert contents(out) == before
    # Without its end it is a run that was interrupted.
    (out / "final").rename(tmp_path / "elsewhere")
    before = contents(out)
    code, sentence = refused(finetune_line(store, rows, out, seed=1), capsys)
    assert code == 73
    assert "seed was 0 and is now 1" in sentence
    assert contents(out) == before


def test_other_rows_in_the_same_file_are_refused(
    store: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(store, rows, tmp_path / "run")
    write_rows(rows, count=12)
    code, sentence = refused(finetune_line(store, rows, out), capsys)
    assert code == 73
    assert "data was" in sentence
    (out / "final").rename(tmp_path / "elsewhere")
    code, sentence = refused(finetune_line(store, rows, out), capsys)
    assert code == 73
    assert "data was" in sentence


@pytest.mark.parametrize("there", ["a folder with something else", "a file"])
def test_what_is_no_run_is_not_touched(
    store: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str
) -> None:
    out = tmp_path / "mine"
    write_file(out / "thesis.txt" if there.startswith("a folder") else out, b"years of work")
    code, sentence = refused(finetune_line(store, rows, out), capsys)
    assert code == 73
    assert f"{out} already exists" in sentence
    assert (contents(out) if out.is_dir() else out.read_bytes()) in ({"thesis.txt": b"years of work"}, b"years of work")


def test_a_run_goes_on_from_an_adapter(store: Path, rows: Path, tmp_path: Path) -> None:
    first = train(store, rows, tmp_path / "first")
    second = train(store, rows, tmp_path / "second", adapter=first)
    assert metrics(second)[0]["eval_loss_start"] == metrics(first)[-1]["eval_loss"]
    assert metrics(second)[-1]["eval_loss"] < metrics(second)[0]["eval_loss_start"]
    assert adapter(first).keys() == adapter(second).keys()


def test_the_same_command_gives_the_same_bytes_in_two_places_and_another_seed_gives_others(
    store: Path, rows: Path, tmp_path: Path
) -> None:
    first, second = train(store, rows, tmp_path / "a" / "run"), train(store, rows, tmp_path / "b" / "deep" / "run")
    assert contents(first / "final") == contents(second / "final")
    assert outcome(first) == outcome(second)
    reseeded = train(store, rows, tmp_path / "c", seed=1)
    assert all(not torch.equal(tensor, adapter(first)[name]) for name, tensor in adapter(reseeded).items())


def test_a_file_of_the_same_bytes_elsewhere_gives_the_same_adapter(store: Path, rows: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "renamed.jsonl"
    write_file(moved, rows.read_bytes())
    first, second = train(store, rows, tmp_path / "first"), train(store, moved, tmp_path / "second")
    assert contents(first / "final") == contents(second / "final")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["checkpoint", "store"])
def test_the_loss_falls_on_either_base_in_every_data_type(
    request: pytest.FixtureRequest, rows: Path, tmp_path: Path, kind: str, dtype: str
) -> None:
    base = request.getfixturevalue(kind)
    out = train(base, rows, tmp_path / "run", steps=12, learning_rate=2e-2, dtype=dtype)
    assert metrics(out)[-1]["eval_loss"] < metrics(out)[0]["eval_loss_start"] - 0.5
    pairs = Adapter.open(out).folder.pairs
    assert len(pairs) == 7
    assert all(part.dtype == torch.float32 for pair in pairs.values() for part in pair)


@pytest.fixture
def base_with_a_hole(tmp_path: Path) -> Path:
    """A checkpoint that makes NaN of every text with a tilde in it."""
    from safetensors.torch import load_file, save_file

    base = small_checkpoint(tmp_path / "holed")
    weights = load_file(base / "model.safetensors")
    tilde = Tokenizer.open(base).encode("~")[0]
    weights["model.embed_tokens.weight"][tilde] = torch.inf
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def _write(path: Path, *rows: dict[str, Any]) -> Path:
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


GOOD, BAD = {"prompt": "one ", "answer": "two"}, {"prompt": "three~", "answer": "four"}


def test_a_step_that_is_not_finite_is_skipped_counted_and_never_averaged_in(
    base_with_a_hole: Path, tmp_path: Path
) -> None:
    rows = _write(tmp_path / "rows.jsonl", GOOD, GOOD, BAD, GOOD)
    settings = {"held_out": 0, "batch_size": 1, "accumulate": 1, "dropout": 0, "steps": 8}
    out = train(base_with_a_hole, rows, tmp_path / "run", **settings)
    found = metrics(out)
    skipped = [step for step in found if "skipped" in step]
    # Eight samples are two epochs, so the bad row comes twice.
    assert len(skipped) == 2
    assert all(step["loss"] is None and step["grad_norm"] is None for step in skipped)
    # The good rows are all alike: without the bad one the same six updates are made.
    good = _write(tmp_path / "good.jsonl", GOOD)
    clean = train(base_with_a_hole, good, tmp_path / "clean", **{**settings, "steps": 6})
    assert [step["loss"] for step in found if "skipped" not in step] == [step["loss"] for step in metrics(clean)]
    for name, tensor in adapter(clean).items():
        assert torch.equal(tensor, adapter(out)[name])


def test_three_steps_in_a_row_that_are_not_finite_are_endured_and_a_fourth_stops_and_names_the_rows(
    base_with_a_hole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _write(tmp_path / "rows.jsonl", BAD)
    settings = {"held_out": 0, "batch_size": 1, "accumulate": 1}
    endured = train(base_with_a_hole, rows, tmp_path / "three", **settings, steps=3)
    assert all(not tensor.any() for name, tensor in adapter(endured).items() if "lora_B" in name)
    line = finetune_line(base_with_a_hole, rows, tmp_path / "four", **settings, steps=4, save_every=1)
    # The second time it goes on from the third step, and must not count anew.
    for _ in range(2):
        code, sentence = refused(line, capsys)
        assert code == 65
        assert "step 4: the loss is not finite" in sentence
        assert "rows.jsonl:1" in sentence
    assert not (tmp_path / "four" / "final").exists()


def test_held_out_rows_whose_loss_is_not_finite_are_named(
    base_with_a_hole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _write(tmp_path / "rows.jsonl", GOOD)
    held_out = _write(tmp_path / "held-out.jsonl", GOOD, BAD)
    line = finetune_line(base_with_a_hole, rows, tmp_path / "run", eval_data=f"jsonl:{held_out}", batch_size=1)
    code, sentence = refused(line, capsys)
    assert code == 65
    assert "held-out.jsonl:2" in sentence
    assert "held-out.jsonl:1" not in sentence
    assert not (tmp_path / "run" / "final").exists()


def test_held_out_and_eval_data_exclude_each_other(
    store: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = finetune_line(store, rows, tmp_path / "run", held_out=0.2, eval_data=f"jsonl:{rows}")
    code, sentence = refused(line, capsys)
    assert code == 2
    assert "exclude each other" in sentence


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        ("nosuch:rows.jsonl", 2, "there is no dataset named 'nosuch' (installed: alpaca, alpaca-cleaned, "),
        ("rows.jsonl", 2, "write NAME:PATH"),
        ("jsonl:missing.jsonl", 66, "no file or folder at missing.jsonl"),
        ("jsonl:torn.jsonl", 65, "torn.jsonl:2: not valid JSON"),
        ("jsonl:unanswered.jsonl", 65, 'unanswered.jsonl:2: field "answer" is missing'),
        ("jsonl:empty.jsonl", 65, "empty.jsonl holds no rows"),
        ("jsonl:long.jsonl", 65, "long.jsonl:2: nothing is left to train"),
    ],
)
def test_data_that_cannot_be_used_is_named_and_leaves_nothing_behind(
    *,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: str,
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(Path("rows.jsonl"), GOOD)
    _write(Path("unanswered.jsonl"), GOOD, {"prompt": "five"})
    _write(Path("long.jsonl"), GOOD, {"prompt": "p" * 40, "answer": "a"})
    write_file(Path("torn.jsonl"), json.dumps(GOOD).encode() + b'\n{"prompt": "three')
    write_file(Path("empty.jsonl"), b"")
    line = finetune_line(store, Path("unused"), Path("run"), max_tokens=32)
    line[line.index("--data") + 1] = data
    found, sentence = refused(line, capsys)
    assert found == code
    assert words in sentence
    assert not Path("run").exists()


def test_samples_that_are_too_long_are_cut_and_counted(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _write(tmp_path / "rows.jsonl", GOOD, {"prompt": "count ", "answer": "1" * 40}, GOOD)
    out = train(store, rows, tmp_path / "run", max_tokens=16, steps=1, batch_size=3, accumulate=1, held_out=0)
    assert "1 of 3 samples were cut at 16 tokens" in capsys.readouterr().err
    assert metrics(out)[0]["tokens"] == 8 + 15 + 8


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"base": "absent"}, 66, "absent"),
        ({"adapter": "absent"}, 66, "absent"),
        ({"adapter": "unfit"}, 65, "does not fit this base"),
        ({"steps": 0}, 78, "steps takes a whole number, at least 1, and was given 0"),
        ({"dropout": 1}, 78, "dropout takes a number, at least 0, below 1, and was given 1.0"),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_met_is_named_and_leaves_nothing_behind(
    *,
    store: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    code: int,
    words: str,
) -> None:
    if change.get("adapter") == "unfit":
        wider = small_checkpoint(tmp_path / "wider", intermediate_size=40)
        train(wider, rows, tmp_path / "unfit", steps=1)
    # Absolute, or it would be looked for on the Hub.
    settings = {name: tmp_path / value if isinstance(value, str) else value for name, value in change.items()}
    line = finetune_line(settings.pop("base", store), rows, tmp_path / "run", **settings)
    found, sentence = refused(line, capsys)
    assert found == code
    assert words in sentence
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_is_not_taken_for_an_adapter(
    store: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(store, rows, tmp_path / "run")
    (out / "final").rename(tmp_path / "elsewhere")
    code, sentence = refused(finetune_line(store, rows, tmp_path / "second", adapter=out), capsys)
    assert code == 66
    assert "has not ended" in sentence


def test_the_defaults_are_written_with_what_was_given(store: Path, rows: Path, tmp_path: Path) -> None:
    from qlora_pipe.settings import read_yaml

    resolved = read_yaml(train(store, rows, tmp_path / "run") / "config.resolved.yaml")
    assert {name: resolved[name] for name in SETTINGS} == SETTINGS
    assert resolved["base"] == str(store)
    assert resolved["data"] == f"jsonl:{rows}"
    assert resolved["beta2"] == 0.999
    assert resolved["max_grad_norm"] == 0.3


TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


def _chats(tmp_path: Path) -> str:
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": TURNS}) + "\n") * 4)
    return f"jsonl:{tmp_path / 'chats.jsonl'}"


def test_the_adapter_carries_the_template_that_it_was_trained_with(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    line = ["finetune", str(base), "--data", _chats(tmp_path), "--steps", "1", "--rank", "2"]
    assert execute([*line, "--out", str(tmp_path / "guanaco")]) == 0
    carried = (tmp_path / "guanaco/final/chat_template.jinja").read_text()
    # Other programs put no BOS before what a template writes.
    assert carried.startswith('{{- "<s>" }}')
    assert "### Human: " in carried
    own = "{{ bos_token }}{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    (base / "chat_template.jinja").write_text(own)
    assert execute([*line, "--out", str(tmp_path / "own")]) == 0
    assert (tmp_path / "own/final/chat_template.jinja").read_text() == own
    assert execute([*line, "--out", str(tmp_path / "chatml"), "--template", "chatml"]) == 0
    assert "<|im_start|>" in (tmp_path / "chatml/final/chat_template.jinja").read_text()


def test_an_adapter_trained_on_prompts_and_answers_carries_no_template_of_ours(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    line = ["finetune", str(base), "--data", f"jsonl:{tmp_path / 'rows.jsonl'}", "--steps", "1", "--rank", "2"]
    assert execute([*line, "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run/final/chat_template.jinja").exists()


def test_another_template_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}")
    line = ["finetune", str(base), "--data", _chats(tmp_path), "--steps", "1", "--rank", "2"]
    line += ["--template", str(template), "--out", str(tmp_path / "run")]
    assert execute(line) == 0
    assert execute(line) == 0
    assert "already done" in capsys.readouterr().err
    template.write_text(template.read_text() + "{# #}.")
    assert execute(line) == 73


def test_a_template_that_asks_for_the_day_is_told_always_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    own = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    (base / "chat_template.jinja").write_text(own)
    line = ["finetune", str(base), "--data", _chats(tmp_path), "--steps", "1", "--rank", "2"]
    assert execute([*line, "--out", str(tmp_path / "run")]) == 0
    assert "the chat template asks for today's date; it is always told 26 July 2024." in capsys.readouterr().err
