"""Strangers' plugins that are broken: each is named, and takes nothing with it that does not need it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe.architecture import Architecture
from qlora_pipe.cli import COMMANDS
from qlora_pipe.dataset import Dataset
from qlora_pipe.errors import ConfigError, UsageProblem
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.plugins import (
    built_ins_alone,
    datasets,
    find_architecture,
    find_dataset,
    list_plugins,
    load_plugins,
    plugins_of,
)
from qlora_pipe.testing import TOY, RunCli, tiny_checkpoint
from tests.pipe.strangers import DATASET, Strangers, strangers

pytest_plugins = ["qlora_pipe.testing.fixtures"]
__all__ = ["strangers"]

HOOK = "from qlora_pipe.hookspecs import hookimpl\n\n@hookimpl\ndef {name}({arguments}):\n    {body}\n"
BROKEN_IMPORTS = {
    "raises": ("raise RuntimeError('no\\ndriver')", "RuntimeError: no driver"),
    "interrupts": ("raise KeyboardInterrupt", "passed over: KeyboardInterrupt."),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "leaves": ("import os; os._exit(3)", "its import ended the process (exit code 3)"),
    "leaves in silence": ("import os; os._exit(0)", "its import ended the process (exit code 0)"),
    "is killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended the process (signal 9)"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "ended the process (signal 11)"),
    "needs what is not there": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "is no Python": ("def broken(:", "SyntaxError: "),
    "misspells a hook": (
        HOOK.format(name="register_dataset", arguments="", body="return []"),
        "it implements 'register_dataset', a hook that does not exist, did you mean 'register_datasets'?",
    ),
    "asks for too much": (
        HOOK.format(name="step_finished", arguments="report, colour", body="pass"),
        "it implements a hook wrongly: PluginValidationError",
    ),
    "has no hook": (
        "def register_datasets():\n    return []\n",
        "it implements no hook; mark its functions with hookimpl",
    ),
}


@pytest.mark.parametrize("name", BROKEN_IMPORTS)
def test_a_plugin_that_cannot_be_imported_is_named_and_passed_over(
    name: str, strangers: Strangers, run_cli: RunCli
) -> None:
    code, reason = BROKEN_IMPORTS[name]
    strangers.install(code)
    done = run_cli("plugins", "--json")
    assert done.exit_code == 0
    assert {"llama", "alpaca"} <= {row["name"] for row in json.loads(done.stdout)}
    assert done.stderr.startswith("note: plugin 'broken' of qlora-broken 1.0 was passed over: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("code", ["import time; time.sleep(1e6)", "while True: pass"], ids=["sleeps", "is busy"])
def test_an_import_that_never_ends_is_ended(
    code: str, strangers: Strangers, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_PIPE_PLUGINS_TIMEOUT", "1.5")
    strangers.install(code)
    done = run_cli("plugins")
    assert done.exit_code == 0
    assert "its import took more than 1.5 s (QLORA_PIPE_PLUGINS_TIMEOUT allows more)" in done.stderr
    assert "llama" in done.stdout


def test_what_an_import_leaves_running_does_not_hold_anyone_up(strangers: Strangers, run_cli: RunCli) -> None:
    code = "import sys, threading, time\nif 'qlora_pipe.cli' not in sys.modules:\n"
    code += "    threading.Thread(target=time.sleep, args=(1e6,)).start()\n"
    strangers.install(code + DATASET.format(name="threaded"))
    assert "threaded" in run_cli("plugins").stdout


@pytest.mark.parametrize("limit", ["soon", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_no_time_is_refused(
    limit: str, strangers: Strangers, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers.install("pass")
    monkeypatch.setenv("QLORA_PIPE_PLUGINS_TIMEOUT", limit)
    done = run_cli("plugins")
    assert done.exit_code == 78
    assert f"QLORA_PIPE_PLUGINS_TIMEOUT is {limit!r}; it must be a number of seconds" in done.stderr


ARCHITECTURE = (
    "dataclasses.replace(__import__('qlora_pipe.skeleton.toy', fromlist=['x']).ARCHITECTURE, name='good', {change})"
)
BROKEN_ANSWERS = {
    "None": ("None", "register_architectures returned None where a list of Architecture is asked for"),
    "a text": ("'toy'", "returned 'toy' where a list of Architecture is asked for"),
    "one": (ARCHITECTURE.format(change=""), "returned Architecture(name='good'"),
    "a list of text": ("['toy']", "returned 'toy' in place of one Architecture"),
    "a list of classes": ("[dict]", "returned <class 'dict'> in place of one Architecture"),
    "an error": ("1 / 0", "failed in register_architectures: ZeroDivisionError: division by zero"),
    "an exit": ("exit(4)", "failed in register_architectures: SystemExit: 4"),
    "no name": (f"[{ARCHITECTURE.format(change='')[: -len('name=good, )') - 2]}name=None)]", "whose name is None"),
    "patterns": (f"[{ARCHITECTURE.format(change='blocks=3')}]", "whose blocks is 3; it must be a list of texts"),
    "a pattern": (f"[{ARCHITECTURE.format(change='adapt=chr(42)')}]", "adapt is '*'; it must be a list of texts"),
    "no function": (f"[{ARCHITECTURE.format(change='build=None')}]", "build is None; it must be a function"),
    "another kind": (f"[{ARCHITECTURE.format(change='kind=None')}]", "kind is None; it must be one of causal, seq2seq"),
    "no flag": (f"[{ARCHITECTURE.format(change='packs=None')}]", "packs is None; it must be a bool"),
    "no config": (f"[{ARCHITECTURE.format(change='tiny=None')}]", "tiny is None; it must be a mapping"),
}


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_a_plugin_that_answers_nonsense_is_named_and_passed_over(
    name: str, strangers: Strangers, run_cli: RunCli
) -> None:
    answer, reason = BROKEN_ANSWERS[name]
    strangers.install(
        "import dataclasses\n"
        + HOOK.format(name="register_architectures", arguments="", body=f"return {answer}")
        + HOOK.format(name="register_datasets", arguments="", body="return []")
    )
    done = run_cli("plugins")
    assert done.exit_code == 0
    assert "llama" in done.stdout
    # An answer of None is the same to pluggy as none at all.
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["a:b", "a b", "", "-x"])
def test_a_name_that_no_command_line_could_hold_is_refused(name: str, strangers: Strangers, run_cli: RunCli) -> None:
    strangers.install(DATASET.format(name=name))
    done = run_cli("plugins")
    assert f"brings Dataset {name!r} whose name is {name!r}; it must be letters, digits" in done.stderr


def test_what_a_plugin_prints_stays_out_of_a_commands_result(strangers: Strangers, run_cli: RunCli) -> None:
    code = DATASET.format(name="chatty").replace("    return [", "    print('asked')\n    return [")
    strangers.install("print('hello')\n" + code)
    done = run_cli("plugins", "--json")
    assert "chatty" in {row["name"] for row in json.loads(done.stdout)}
    assert "note: plugin 'broken' of qlora-broken 1.0 prints when it is imported: 'hello'." in done.stderr
    assert "asked" in done.stderr


def test_a_broken_plugin_does_not_stop_a_command_that_does_not_need_it(
    strangers: Strangers, run_cli: RunCli, tmp_path: Path
) -> None:
    strangers.install("import os; os._exit(1)")
    done = run_cli("quantize", tiny_checkpoint(tmp_path / "source"), tmp_path / "store")
    assert done.exit_code == 0
    assert done.stderr.count("was passed over") == 1


def test_a_command_that_may_need_a_broken_plugin_is_refused_with_its_name(
    strangers: Strangers, run_cli: RunCli, tmp_path: Path
) -> None:
    strangers.install("raise RuntimeError('no driver')")
    source = tiny_checkpoint(tmp_path / "source", family=TOY)
    done = run_cli("quantize", source, tmp_path / "store")
    assert done.exit_code == 78
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: no installed plugin reads model_type 'toy' (installed: ")
    assert said.endswith(" Passed over: plugin 'broken' of qlora-broken 1.0 (RuntimeError: no driver).")
    with pytest.raises(UsageProblem, match=r"no dataset named 'riddles'.*Passed over: plugin 'broken' of qlora-broken"):
        find_dataset(load_plugins(), "riddles")


def test_a_plugin_cannot_take_the_name_of_another(strangers: Strangers, capsys: pytest.CaptureFixture[str]) -> None:
    strangers.install(DATASET.format(name="mine"), name="llama")
    strangers.install(DATASET.format(name="first"), name="twin", distribution="qlora-a")
    strangers.install(DATASET.format(name="second"), name="twin", distribution="qlora-b")
    manager = load_plugins()
    assert find_architecture(manager, "llama").name == "llama"
    assert {"first"} == datasets(manager).keys() & {"mine", "first", "second"}
    said = capsys.readouterr().err
    assert (
        "plugin 'llama' of qlora-broken 1.0 was passed over: another plugin of that name is there, of qlora-pipe"
        in said
    )
    assert "plugin 'twin' of qlora-b 1.0 was passed over: another plugin of that name is there, of qlora-a 1.0" in said


def test_two_things_of_one_name_are_refused_by_that_name_alone(
    strangers: Strangers, capsys: pytest.CaptureFixture[str]
) -> None:
    strangers.install(DATASET.format(name="alpaca"))
    manager = load_plugins()
    assert find_dataset(manager, "jsonl").name == "jsonl"
    assert "alpaca" not in datasets(manager)
    sentence = r"two plugins bring the dataset 'alpaca', plugin 'broken' of qlora-broken 1.0 and plugin 'datasets' of"
    assert f"note: neither can be used: {sentence} qlora-pipe" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=sentence):
        find_dataset(manager, "alpaca")
    both = [entry.plugin for entry in list_plugins(manager) if (entry.kind, entry.name) == ("dataset", "alpaca")]
    assert both == ["broken", "datasets"]


class Brings:
    """A plugin that is handed over."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    @hookimpl
    def register_architectures(self) -> list[Architecture]:
        return [item for item in self.items if not isinstance(item, Dataset)]

    @hookimpl
    def register_datasets(self) -> list[Dataset]:
        return [item for item in self.items if isinstance(item, Dataset)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [("row.fields['nothing']", "KeyError: 'nothing'"), ("__import__('json').loads(3)", "TypeError: the JSON object")],
)
def test_an_error_in_a_strangers_function_is_put_down_to_it(
    body: str, reason: str, strangers: Strangers, run_cli: RunCli, tmp_path: Path
) -> None:
    strangers.install(DATASET.format(name="mine").replace("return ()", f"return {body}"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    base = tiny_checkpoint(tmp_path / "source")
    words = ("finetune", base, "--data", f"mine:{tmp_path / 'rows.jsonl'}", "--out", tmp_path / "run")
    done = run_cli(*words)
    assert done.exit_code == 70
    assert f"error: plugin 'broken' of qlora-broken 1.0 failed ({reason}" in done.stderr
    assert "tell its author, or go on without it: --no-plugins" in done.stderr


def test_an_error_of_ours_is_not_put_down_to_a_plugin(strangers: Strangers, run_cli: RunCli, monkeypatch: Any) -> None:
    strangers.install(DATASET.format(name="mine"))
    monkeypatch.setattr("qlora_pipe.cli.plugins.list_plugins", lambda _: 1 // 0)
    assert "a bug of ours (ZeroDivisionError" in run_cli("plugins").stderr


def test_two_families_that_read_one_model_type_are_refused_for_it() -> None:
    manager = load_plugins(Brings(replace(TOY, model_types=("toy", "llama"))))
    assert find_architecture(manager, "toy").name == "toy"
    with pytest.raises(ConfigError, match="two plugins read model_type 'llama'"):
        find_architecture(manager, "llama")


def test_an_object_that_is_handed_over_and_wrong_is_an_error_at_once() -> None:
    with pytest.raises(ConfigError, match=r"register_architectures returned 'nothing' in place of one Architecture"):
        find_architecture(load_plugins(Brings("nothing")), "llama")
    with pytest.raises(ConfigError, match="whose blocks is None"):
        find_architecture(plugins_of(Brings(replace(TOY, blocks=None))), "toy")  # type: ignore[arg-type]


def test_a_manager_of_given_plugins_has_no_others() -> None:
    manager = plugins_of(Brings(TOY))
    assert [entry.name for entry in list_plugins(manager)] == ["toy"]


COUNTED = "from pathlib import Path\nwith Path({log!r}).open('a') as log: log.write('imported ')\n"


@pytest.fixture
def counted(strangers: Strangers, tmp_path: Path) -> Path:
    """A good plugin that leaves a mark for each time it is imported."""
    log = tmp_path / "imports.txt"
    log.touch()
    strangers.install(COUNTED.format(log=str(log)) + DATASET.format(name="counted"))
    return log


def test_help_imports_no_plugin(counted: Path, run_cli: RunCli) -> None:
    for words in [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["plugins", "new", "--help"]]:
        assert run_cli(*words).exit_code == 0
    assert counted.read_text() == ""


def test_a_plugin_is_tried_out_once_in_a_process(counted: Path) -> None:
    assert find_dataset(load_plugins(), "counted").name == "counted"
    assert counted.read_text() == "imported imported "
    assert find_dataset(load_plugins(), "counted").name == "counted"
    assert counted.read_text() == "imported imported "


def test_no_plugins_leaves_strangers_out_unseen(counted: Path, run_cli: RunCli) -> None:
    done = run_cli("--no-plugins", "plugins")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "llama" in done.stdout
    assert "counted" not in done.stdout
    assert counted.read_text() == ""
    # It holds for that one command.
    assert "counted" in run_cli("plugins").stdout


def test_what_no_plugins_leaves_out_is_not_said_to_be_missing(counted: Path) -> None:
    with built_ins_alone(), pytest.raises(UsageProblem, match=r"Plugins of others were left out \(--no-plugins\)"):
        find_dataset(load_plugins(), "counted")
    assert find_dataset(load_plugins(), "counted").name == "counted"
