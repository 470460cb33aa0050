"""Plugins: found, listed, refused and called; the examples of docs/plugins.md are run as they stand there."""

import json
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_pipe.architecture import Architecture
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint
from qlora_pipe.cli.document import plugins_page
from qlora_pipe.config import ExportConfig, FinetuneConfig, MergeConfig, QuantizeConfig
from qlora_pipe.dataset import Dataset
from qlora_pipe.errors import ConfigError, DataError, UsageProblem
from qlora_pipe.exporter import Exporter
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.plugins import architectures, find_architecture, find_dataset, find_exporter, list_plugins, load_plugins
from qlora_pipe.skeleton import riddles, tarball, toy
from qlora_pipe.stages.finetune import finetune
from qlora_pipe.stages.load import load
from qlora_pipe.stages.merge import merge
from qlora_pipe.stages.quantize import quantize
from qlora_pipe.testing import TOY, RunCli, tiny_checkpoint
from qlora_pipe.train.request import FinetuneRequest
from tests.pipe.documented import PAGE, example

pytest_plugins = ["qlora_pipe.testing.fixtures"]


def test_the_built_in_plugins_come_through_the_entry_points() -> None:
    found = {(entry.kind, entry.name) for entry in list_plugins(load_plugins())}
    assert {("architecture", "llama"), ("dataset", "alpaca"), ("dataset", "jsonl"), ("dataset", "text")} <= found
    assert ("exporter", "hub") in found
    assert {entry.distribution for entry in list_plugins(load_plugins())} == {"qlora-pipe"}


def test_each_manager_is_fresh() -> None:
    class Extra:
        @hookimpl
        def register_datasets(self) -> list[Dataset]:
            return [Dataset(name="extra", help="", example=lambda _row: ())]

    assert find_dataset(load_plugins(Extra()), "extra").name == "extra"
    with pytest.raises(UsageProblem, match=r"there is no dataset named 'extra' \(installed: alpaca, .*jsonl, .*\)"):
        find_dataset(load_plugins(), "extra")


def test_a_misspelt_hook_is_an_error() -> None:
    class Misspelt:
        @hookimpl
        def register_dataset(self) -> list[Dataset]:
            return []

    with pytest.raises(ConfigError, match="register_dataset"):
        load_plugins(Misspelt())


def test_two_plugins_of_one_name_are_refused() -> None:
    class Twin:
        @hookimpl
        def register_datasets(self) -> list[Dataset]:
            return [Dataset(name="alpaca", help="", example=lambda _row: ())]

    with pytest.raises(ConfigError, match="two plugins bring the dataset 'alpaca'"):
        find_dataset(load_plugins(Twin()), "alpaca")


def test_an_unknown_model_type_is_answered_with_the_installed_ones() -> None:
    with pytest.raises(ConfigError, match="no installed plugin reads model_type 'gpt2'") as refusal:
        find_architecture(load_plugins(), "gpt2")
    listed = str(refusal.value).partition("(installed: ")[2].partition(")")[0].split(", ")
    assert listed == sorted(listed)
    assert {"llama", "mistral", "qwen2", "qwen3"} <= set(listed)


def test_a_family_is_made_for_a_config_that_nobody_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qlora_pipe_toy", toy)
    manager = load_plugins(example("qlora_toys"))
    config = {"model_type": "toy-wide", "hidden_size": 8, "vocab_size": 11, "num_hidden_layers": 2}
    assert find_architecture(manager, "toy-wide", config=config).name == "toy-wide"
    with pytest.raises(ConfigError, match="no installed plugin reads model_type 'toy-wide'"):
        find_architecture(manager, "toy-wide")


def test_the_first_answer_about_a_config_is_taken_and_registered_families_come_before_it() -> None:
    class Greedy:
        @hookimpl
        def find_architecture(self, config: Mapping[str, Any]) -> Architecture:
            return replace(architectures(load_plugins())["llama"], name=f"made of {config['model_type']}")

    manager = load_plugins(Greedy())
    assert find_architecture(manager, "x", config={"model_type": "x"}).name == "made of x"
    assert find_architecture(manager, "llama", config={"model_type": "llama"}).name == "llama"


def test_the_documented_files_are_those_that_a_new_plugin_has() -> None:
    page = PAGE.read_text()
    assert plugins_page(page) == page, "run `make docs`"
    for shown in ("toy/qlora_pipe_toy/model.py", "riddles/pyproject.toml", "tarball/qlora_pipe_tarball/__init__.py"):
        assert plugins_page(page.replace(f"# {shown}\n", f"# {shown}\nold ")) == page


def test_the_documented_command_writes_what_the_page_says(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "qlora-pipe plugins new riddles --kind dataset"
    done = run_cli(*command.split()[1:])
    assert f"$ {command}\n{done.stdout}```" in PAGE.read_text()


def test_the_documented_dataset_reads_its_file(tmp_path: Path) -> None:
    manager = load_plugins(riddles)
    file = tmp_path / "riddles.jsonl"
    file.write_text('{"question": "What has keys?", "answer": "A piano"}\n{"question": "None", "answer": "x"}\n')
    rows = find_dataset(manager, "riddles").read(file)
    assert [message.content for message in next(rows).messages] == ["What has keys? ", "A piano"]
    with pytest.raises(DataError, match=r'riddles.jsonl:2: field "question" has no question mark'):
        next(rows)


@pytest.fixture
def toy_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of the documented architecture, beside a text to train on."""
    (tmp_path / "text.txt").write_text("to be or not to be that is the question " * 20)
    return tiny_checkpoint(tmp_path / "source", family=TOY)


def test_an_architecture_that_cannot_pack_refuses_to_before_anything_is_read(toy_checkpoint: Path) -> None:
    out = toy_checkpoint.parent / "run"
    request = FinetuneRequest(base=str(toy_checkpoint), data="text:nowhere", out=out, config=FinetuneConfig(pack=True))

    class Packless:
        @hookimpl
        def register_architectures(self) -> list[Architecture]:
            return [replace(TOY, packs=False)]

    with pytest.raises(ConfigError, match="models of the family toy cannot be trained with --pack; leave it out"):
        finetune(request, manager=load_plugins(Packless()))
    assert not out.exists()


def test_the_documented_architecture_goes_through_the_whole_chain(toy_checkpoint: Path, tmp_path: Path) -> None:
    manager, source = load_plugins(toy), toy_checkpoint
    quantize(Checkpoint.open(source), tmp_path / "store", QuantizeConfig(), manager=manager)
    settings = FinetuneConfig(steps=30, batch_size=4, rank=4, learning_rate=0.1, max_tokens=32, max_grad_norm=0)
    request = FinetuneRequest(
        base=str(tmp_path / "store"), data=f"text:{tmp_path / 'text.txt'}", out=tmp_path / "run", config=settings
    )
    run = finetune(request, manager=manager)
    steps = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert steps[-1]["eval_loss"] < steps[0]["eval_loss_start"] - 0.2
    store, adapter = QuantizedCheckpoint.open(tmp_path / "store"), Adapter.open(run.path)
    merge(store, adapter, tmp_path / "merged", MergeConfig(dtype="float32"), manager=manager)
    family, ids = find_architecture(manager, "toy"), torch.arange(3, 40)[None]
    cpu = torch.device("cpu")
    adapted = load(store, family, dtype=torch.float32, device=cpu, adapter=adapter)
    merged = load(Checkpoint.open(tmp_path / "merged"), family, dtype=torch.float32, device=cpu)
    torch.testing.assert_close(adapted.module(ids), merged.module(ids), rtol=0, atol=1e-4)


def test_the_documented_exporter_writes_its_archive(tmp_path: Path) -> None:
    exporter = find_exporter(load_plugins(tarball), "tarball")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    where = exporter.push(tmp_path / "model", ExportConfig(to="tarball"))
    assert where == str(tmp_path / "model.tar")
    with tarfile.open(where) as file:
        assert "model/config.json" in file.getnames()


def test_the_documented_choice_of_precision_keeps_the_first_layer() -> None:
    choose = load_plugins(example("qlora_careful")).hook.choose_precision
    assert choose(model_type="llama", tensor="model.layers.0.mlp.up_proj.weight") == "keep"
    assert choose(model_type="llama", tensor="model.layers.10.mlp.up_proj.weight") is None


def test_the_documented_logger_hears_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    load_plugins(example("qlora_printer")).hook.step_finished(report={"step": 3, "loss": 1.5})
    assert capsys.readouterr().out == "3 1.5\n"


def test_hook_calls_are_printed_on_demand(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PIPE_TRACE", "1")
    done = run_cli("plugins")
    assert "register_datasets [hook]" in done.stderr
    assert "[hook]" not in done.stdout


def test_a_logger_may_take_no_argument() -> None:
    calls = []

    class Counter:
        @hookimpl
        def step_finished(self) -> None:
            calls.append(1)

    load_plugins(Counter()).hook.step_finished(report={})
    assert calls == [1]


def test_register_hooks_may_be_methods_of_one_object() -> None:
    class Everything:
        @hookimpl
        def register_architectures(self) -> list[Architecture]:
            return []

        @hookimpl
        def register_exporters(self) -> list[Exporter]:
            return [Exporter(name="nowhere", help="", push=lambda _path, _config: "")]

    assert find_exporter(load_plugins(Everything()), "nowhere").name == "nowhere"


def test_the_plugins_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_pipe.cli import execute

    assert execute(["plugins", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert {"name": "llama", "kind": "architecture"}.items() <= next(r for r in rows if r["name"] == "llama").items()
