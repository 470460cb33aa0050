"""The command line: its contract, its exit codes, and one sentence for whatever goes wrong."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from qlora_formats.errors import CommitError, FormatError
from qlora_pipe import errors
from qlora_pipe.cli import COMMANDS, execute, explain, qlora_pipe

CONTRACT = {
    "quantize": {"--type", "--block-size", "--double-quant"},
    "finetune": {
        *("--data", "--out", "--steps", "--batch-size", "--accumulate", "--learning-rate", "--rank", "--alpha"),
        *("--dropout", "--max-tokens", "--held-out", "--eval-data", "--eval-every", "--adapter", "--seed"),
        *("--save-every", "--dtype", "--device"),
    },
    "preview": {"--base", "--data", "--rows", "--max-tokens", "--template", "--train-on", "--json"},
    "merge": {"--dtype"},
    "generate": {"--adapter", "--prompt", "--max-new-tokens", "--temperature"},
    "export": {"--to", "--repo", "--private"},
    "run": set(),
    "inspect": {"--json"},
    "verify": {"--json"},
    "plugins": {"--json"},
    "demo": {"--out"},
}


@pytest.mark.parametrize("name", CONTRACT)
def test_the_promised_flags_are_there(name: str) -> None:
    command = qlora_pipe.get_command(click.Context(qlora_pipe), name)
    assert command is not None
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert CONTRACT[name] <= flags
    assert set(CONTRACT) == set(COMMANDS)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (errors.UsageProblem("a."), 2),
        (errors.DataError("a."), 65),
        (errors.NonFiniteError("a."), 65),
        (errors.MissingInputError("a."), 66),
        (errors.NetworkError("a."), 69),
        (errors.ExistsError("a."), 73),
        (errors.DiskError("a."), 74),
        (errors.TryAgainError("a."), 75),
        (errors.ConfigError("a."), 78),
        (errors.Interrupted("a.", signal_number=2), 130),
        (errors.Interrupted("a.", signal_number=15), 143),
        (FormatError("a."), 65),
        (CommitError("a.", reason="conflict"), 73),
        (CommitError("a.", reason="locked"), 75),
        (CommitError("a.", reason="disk"), 74),
        (OSError(errno.ENOSPC, "No space left on device"), 74),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 66),
        (KeyError("x"), 70),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_each_error_has_its_exit_code_and_one_line(fault: Exception, code: int) -> None:
    found, message = explain(fault)
    assert found == code
    assert message
    assert "\n" not in message


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["quantise"]) == 2
    assert "No such command 'quantise'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["quantize", "./nowhere", "out"], 66, "there is no folder './nowhere'"),
        (["quantize", "./nowhere", "out", "--block-size", "65"], 78, "block_size takes one of 32, 64, 128"),
        (["quantize", "./nowhere", "out", "--shard-mib", "0"], 78, "shard_mib takes a whole number, at least 1"),
        (["finetune", "./nowhere", "--out", "run"], 2, "finetune needs --data NAME:PATH"),
        (["finetune", "./nowhere", "--data", "text:x"], 2, "finetune needs --out RUN"),
        (["finetune", "missing.yaml"], 66, "there is no config file missing.yaml"),
        (["finetune", "bad.yaml"], 78, "there is no setting 'learing_rate', did you mean 'learning_rate'?"),
        (["finetune", "twice.yaml"], 78, "the key 'steps' stands there twice"),
        (["finetune", "alias.yaml"], 78, "aliases are not read here"),
        (["finetune", "tagged.yaml"], 78, "not usable YAML"),
        (["finetune", "wrong.yaml"], 78, "steps takes a whole number, at least 1, and was given 'many'"),
        (
            ["finetune", "a", "--data", "text:x", "--out", "r", "--held-out", "0.1", "--eval-data", "text:y"],
            2,
            "exclude",
        ),
        (["generate", "./nowhere", "--prompt", "x", "--top-p", "1.5"], 78, "top_p takes a number, above 0, at most 1"),
        (["inspect", "./nowhere"], 66, "there is no folder './nowhere'"),
        (["run", "stages.yaml"], 78, "there is no stage 'quantise', did you mean 'quantize'?"),
        (["run", "gap.yaml"], 78, "merge needs 'adapter': no stage before it makes one"),
        (["run", "typo.yaml"], 78, "there is no setting 'rnak', did you mean 'rank'?"),
        (["export", "nowhere", "--to", "moon", "--repo", "a/b"], 2, "no export target named 'moon'"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_sentence_and_its_code(  # noqa: PLR0917
    arguments: list[str],
    code: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    head = "base: b\ndata: text:x\nout: r\n"
    files = {
        "bad.yaml": f"{head}learing_rate: 1\n",
        "twice.yaml": f"{head}steps: 1\nsteps: 2\n",
        "alias.yaml": "base: &b x\ndata: *b\n",
        "tagged.yaml": "base: !!python/object/apply:os.system ['true']\n",
        "wrong.yaml": f"{head}steps: many\n",
        "stages.yaml": "quantise: {source: a, out: b}\n",
        "gap.yaml": "merge: {base: a, out: b}\n",
        "typo.yaml": "finetune: {base: a, data: text:x, out: r, rnak: 3}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert execute(arguments) == code
    err = capsys.readouterr().err
    assert sentence in err
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_a_number_like_1e_4_in_yaml_is_a_number(tmp_path: Path) -> None:
    from qlora_pipe.cli.finetune import resolve_request

    (tmp_path / "run.yaml").write_text("base: b\ndata: text:x\nout: r\nlearning_rate: 1e-4\nsteps: 7\n")
    base, data, out, config = resolve_request(str(tmp_path / "run.yaml"), None, None, {"steps": 9, "rank": None})
    assert (base, data, out) == ("b", "text:x", Path("r"))
    assert (config.learning_rate, config.steps, config.rank) == (1e-4, 9, 64)


def test_a_traceback_is_shown_only_when_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qlora_pipe", "inspect", str(tmp_path)]
    for debug, shown in (("0", False), ("1", True)):
        done = subprocess.run(
            command, env={**os.environ, "QLORA_PIPE_DEBUG": debug}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 65
        assert ("Traceback" in done.stderr) is shown
        assert re.search(r"^error: .* is not a model", done.stderr, re.MULTILINE)
