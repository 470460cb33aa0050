"""Pushing folders, with the real huggingface_hub against a stand-in of the Hub."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from qlora_formats.commit import commit_folder
from qlora_formats.manifest import Manifest
from qlora_pipe.errors import ExistsError, NetworkError
from qlora_pipe.hub import push, resolve
from tests.hub_server import HubServer, closed_port, files_of, write_files

pytest_plugins = ("tests.hub_fixtures",)

MODEL = {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(range(256)) * 401}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"A and B" * 999, "tokenizer.json": b"{}"}
STORE = {
    "config.json": b'{"quantization_config": {"load_in_4bit": true}}',
    "model-00001-of-00002.safetensors": b"one" * 333,
    "model-00002-of-00002.safetensors": b"two" * 777,
    "model.safetensors.index.json": b'{"weight_map": {}}',
}


@pytest.mark.parametrize("files", [ADAPTER, STORE, MODEL], ids=["adapter", "store", "merged"])
def test_a_pushed_folder_comes_back_byte_for_byte_with_its_card(hub: HubServer, files: dict[str, bytes]) -> None:
    leftovers = {".cache/x": b"", ".hidden": b"", "journal.jsonl": b"", "work.lock": b"", "runs/log.json": b""}
    folder = write_files(Path("out"), files | leftovers | {"README.md": b"the old one"})
    card = "---\nbase_model: someone/base\ntags: [lora]\n---\n# Card\n"
    assert push(folder, repo="me/pushed", private=False, card=card) == f"{hub.url}/me/pushed"
    assert hub.repos["me/pushed"].private is False
    assert hub.repos["me/pushed"].files == files | {"README.md": card.encode(), ".gitattributes": b""}
    fetched = resolve("me/pushed").path
    assert files_of(fetched) == files | {"README.md": card.encode()}
    front = (fetched / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front) == {"base_model": "someone/base", "tags": ["lora"]}


def test_without_a_card_the_readme_in_the_folder_stays(hub: HubServer) -> None:
    push(write_files(Path("out"), ADAPTER | {"README.md": b"mine"}), repo="me/pushed", private=False, card=None)
    assert hub.repos["me/pushed"].files["README.md"] == b"mine"


def test_the_manifest_of_a_pushed_folder_holds_whatever_becomes_of_its_card(hub: HubServer) -> None:
    with commit_folder(Path("out"), kind="adapter", inputs={"seed": 1}) as work:
        for name, data in (ADAPTER | {"README.md": b"as PEFT writes it"}).items():
            work.write(name, data)
        work.finish({"note": 7})
    push(Path("out"), repo="me/pushed", private=False, card="# Card\n")
    fetched = resolve("me/pushed").path
    manifest = Manifest.read(fetched)
    manifest.verify(fetched)
    assert (manifest.inputs, manifest.fields) == ({"seed": 1}, {"note": 7})
    assert manifest.files.keys() == ADAPTER.keys()
    assert json.loads(Path("out/qlora_pipe.json").read_text())["files"].keys() == ADAPTER.keys() | {"README.md"}
    # Whoever stops half-way finds no manifest yet.
    assert hub.repos["me/pushed"].messages[1:] == ["Upload weights and configuration", "Upload model card and manifest"]
    assert "qlora_pipe.json" not in list(hub.repos["me/pushed"].commits.values())[1]


def test_an_interrupted_push_is_completed_by_the_same_call(hub: HubServer, impatient: None) -> None:
    folder = write_files(Path("out"), STORE)
    second = r"PUT /lfs/" + hashlib.sha256(STORE["model-00002-of-00002.safetensors"]).hexdigest()
    hub.fail(second, status=500)
    with pytest.raises(NetworkError, match=r"cannot push to 'me/pushed': the Hub at .* answered 500"):
        push(folder, repo="me/pushed", private=False, card="# Card\n")
    assert hub.repos["me/pushed"].files.keys() == {".gitattributes"}
    hub.faults.clear()
    already = hub.count("PUT")
    push(folder, repo="me/pushed", private=False, card="# Card\n")
    assert hub.count("PUT") == already + 1
    assert hub.repos["me/pushed"].files.keys() == STORE.keys() | {".gitattributes", "README.md"}


def test_a_private_push_makes_a_private_repository_and_never_uses_a_public_one(hub: HubServer) -> None:
    folder = write_files(Path("out"), ADAPTER)
    push(folder, repo="me/hidden", private=True, card=None)
    assert hub.repos["me/hidden"].private is True
    push(folder, repo="me/hidden", private=False, card="# Later\n")
    hub.add("me/open", {".gitattributes": b""})
    with pytest.raises(ExistsError, match="'me/open' exists and is public"):
        push(folder, repo="me/open", private=True, card=None)
    assert hub.repos["me/open"].files.keys() == {".gitattributes"}


def test_weights_of_another_model_are_not_left_beside_the_pushed_ones(hub: HubServer) -> None:
    hub.add("me/pushed", MODEL)
    with pytest.raises(ExistsError, match=r"already holds model\.safetensors, which is not part of out"):
        push(write_files(Path("out"), STORE), repo="me/pushed", private=False, card=None)
    assert hub.repos["me/pushed"].files == MODEL


@pytest.mark.parametrize("card", [None, "# Card\n"])
def test_a_push_without_a_valid_token_says_what_to_do(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, card: str | None
) -> None:
    folder = write_files(Path("out"), ADAPTER)
    for token in ("", "hf_thisOneIsNotValid"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(NetworkError, match=r"refused with 401 .*set HF_TOKEN to a token that may do it") as fault:
            push(folder, repo="me/pushed", private=False, card=card)
        assert "hf_this" not in str(fault.value)
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    with pytest.raises(NetworkError, match="cannot be reached"):
        push(folder, repo="me/pushed", private=False, card=card)
