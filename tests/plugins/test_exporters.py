"""The `hub` target of `export`: what it accepts, what it refuses, and what arrives."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_formats.adapter import write_adapter
from qlora_formats.adapter_config import AdapterConfig
from qlora_formats.commit import commit_folder
from qlora_formats.errors import FormatError
from qlora_pipe.artifacts import Adapter
from qlora_pipe.config import ExportConfig
from qlora_pipe.errors import MissingInputError, QlorapipeError, UsageProblem
from qlora_pipe.plugins import find_exporter, load_plugins
from qlora_plugins.exporters.hub import push
from tests.hub_server import HubServer, files_of

pytest_plugins = ("tests.hub_fixtures",)

TO_ME = ExportConfig(repo="me/pushed")


def make_adapter(folder: Path, *, kind: str = "adapter") -> Path:
    config = AdapterConfig(r=3, lora_alpha=6.0, target_modules=["q_proj"], task_type="CAUSAL_LM")
    pair = (torch.arange(15.0).reshape(3, 5), torch.arange(21.0).reshape(7, 3))
    with commit_folder(folder, kind=kind, inputs={"settings": {"rank": 3}}) as work:
        write_adapter(work, config=config, pairs={"model.layers.0.self_attn.q_proj": pair}, metadata={})
        work.finish({})
    return folder


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"model.norm.weight": torch.arange(5.0)}, folder / "model.safetensors")
    return folder


def test_the_exporter_comes_through_the_plugin_door() -> None:
    assert find_exporter(load_plugins(), "hub").push is push


def test_an_adapter_arrives_with_its_card_and_opens_by_its_id(hub: HubServer) -> None:
    folder = make_adapter(Path("out"))
    assert push(folder, TO_ME) == f"{hub.url}/me/pushed"
    arrived = hub.repos["me/pushed"].files
    same = files_of(folder).keys() - {"README.md", "qlora_pipe.json"}
    assert {name: arrived[name] for name in same} == {name: (folder / name).read_bytes() for name in same}
    assert b"library_name: peft" in arrived["README.md"]
    assert b"| rank | 3 |" in arrived["README.md"]
    fetched = Adapter.open("me/pushed")
    assert fetched.repo == "me/pushed"
    assert fetched.folder.config.r == 3


def test_a_run_stands_for_the_adapter_it_ended_with(hub: HubServer) -> None:
    run = Path("run")
    run.mkdir()
    (run / "config.resolved.yaml").write_text("rank: 3\n")
    with pytest.raises(MissingInputError, match="has not ended"):
        push(run, TO_ME)
    make_adapter(run / "final")
    push(run, ExportConfig(repo="me/pushed", private=True))
    assert hub.repos["me/pushed"].private
    assert "adapter_model.safetensors" in hub.repos["me/pushed"].files


def test_a_checkpoint_without_a_manifest_is_pushed_as_it_is(hub: HubServer) -> None:
    folder = make_checkpoint(Path("plain"))
    push(folder, TO_ME)
    arrived = hub.repos["me/pushed"].files
    assert arrived.keys() == files_of(folder).keys() | {"README.md", ".gitattributes"}
    assert b"library_name: transformers" in arrived["README.md"]


def test_a_store_is_pushed_as_a_quantized_model(hub: HubServer, shared_data: Path) -> None:
    folder = Path(shutil.copytree(shared_data / "interop" / "stories260K-bnb-nf4-dq", "store"))
    (folder / "reference_dequant.safetensors").unlink()
    push(folder, TO_ME)
    arrived = hub.repos["me/pushed"].files
    assert {name: arrived[name] for name in files_of(folder)} == files_of(folder)
    assert b"- nf4" in arrived["README.md"]


@pytest.mark.parametrize("repo", [None, "", "pushed", "me/", "/me", "me/a/b", "me/a b", "me/pushed@main", "../me"])
def test_a_repository_is_named_by_user_and_name(hub: HubServer, repo: str | None) -> None:
    with pytest.raises(UsageProblem, match="--repo USER/NAME"):
        push(make_adapter(Path("out")), ExportConfig(repo=repo))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("none", MissingInputError, "there is no folder"),
        ("half", MissingInputError, "is unfinished"),
        (".half.partial", MissingInputError, "is unfinished"),
        ("empty", MissingInputError, "is no adapter, store or merged folder"),
        ("step-4", MissingInputError, "is no adapter, store or merged folder"),
        ("changed", FormatError, "does not have the sha256"),
        ("cut", FormatError, "lacks the file"),
        ("no-weights", FormatError, "no-weights"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_before_the_hub_is_asked(
    hub: HubServer, name: str, kind: type[QlorapipeError], sentence: str
) -> None:
    Path("empty").mkdir()
    Path(".half.partial").mkdir()
    make_adapter(Path("step-4"), kind="training")
    weights = make_adapter(Path("changed")) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (make_adapter(Path("cut")) / "adapter_model.safetensors").unlink()
    (make_checkpoint(Path("no-weights")) / "model.safetensors").unlink()
    with pytest.raises(kind, match=sentence):
        push(Path(name), TO_ME)
    assert hub.requests == []
