"""Fetching models, with the real huggingface_hub against a stand-in of the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from qlora_pipe.errors import DiskError, MissingInputError, NetworkError, QlorapipeError
from qlora_pipe.hub import resolve
from tests.hub_server import HubServer, closed_port, files_of, write_files

pytest_plugins = ("tests.hub_fixtures",)

MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 401,
    "LICENSE": b"do what you like",
}
UNREAD = {
    "pytorch_model.bin": b"pickle",
    "consolidated.00.safetensors": b"the same weights again",
    "onnx/model.safetensors": b"elsewhere",
    "training.log": b"log",
}


@pytest.mark.parametrize("repo", ["someone/some-model", "some-model"])
def test_a_repository_is_fetched_by_its_id_and_only_what_is_read(hub: HubServer, repo: str) -> None:
    commit = hub.add(repo, MODEL | UNREAD)
    found = resolve(repo)
    assert files_of(found.path) == MODEL
    assert (found.repo, found.revision) == (repo, commit)


def test_pickled_weights_come_only_when_they_are_allowed(hub: HubServer) -> None:
    hub.add("someone/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    assert files_of(resolve("someone/old", allow_pickle=True).path).keys() == {"config.json", "pytorch_model.bin"}


def test_where_a_repository_has_safetensors_its_pickles_stay_there(hub: HubServer) -> None:
    hub.add("someone/both", MODEL | {"pytorch_model.bin": b"pickle", "pytorch_model.bin.index.json": b"{}"})
    found = files_of(resolve("someone/both", allow_pickle=True).path)
    assert found.keys() == MODEL.keys() | {"pytorch_model.bin.index.json"}
    assert hub.count(r"GET .*\.bin$") == 0


def test_of_pickles_only_weights_are_fetched_and_of_the_same_commit(hub: HubServer) -> None:
    old = hub.add("someone/old", {"config.json": b"{}", "pytorch_model-1.bin": b"1", "training_args.bin": b"no"})
    hub.add("someone/old", {"config.json": b"{}", "pytorch_model.bin": b"new"})
    found = resolve(f"someone/old@{old}", allow_pickle=True)
    assert files_of(found.path).keys() == {"config.json", "pytorch_model-1.bin"}
    assert found.revision == old


def test_a_revision_names_an_older_commit(hub: HubServer) -> None:
    old = hub.add("someone/model", MODEL)
    new = hub.add("someone/model", MODEL | {"config.json": b'{"model_type": "t5"}'})
    assert resolve(f"someone/model@{old}").revision == old
    assert files_of(resolve(f"someone/model@{old}").path) == MODEL
    assert resolve("someone/model").revision == new
    assert resolve("someone/model@main").path.joinpath("config.json").read_bytes() == b'{"model_type": "t5"}'


def test_a_folder_comes_before_a_repository_and_asks_nobody(hub: HubServer) -> None:
    hub.add("someone/model", MODEL)
    folder = write_files(Path("someone/model"), {"config.json": b"{}"})
    assert resolve("someone/model") == (folder, None, None)
    assert hub.requests == []


def test_a_download_cut_in_the_middle_goes_on_where_it_was(hub: HubServer, impatient: None) -> None:
    # The library writes what it receives in pieces of 10 MiB.
    piece = constants.DOWNLOAD_CHUNK_SIZE
    weights = os.urandom(piece + 70_001)
    hub.add("someone/model", {"config.json": b"{}", "model.safetensors": weights})
    hub.drop(r"GET .*/model\.safetensors$", after=piece + 50_003)
    assert resolve("someone/model").path.joinpath("model.safetensors").read_bytes() == weights
    ranges = [request.headers.get("range") for request in hub.requests if request.path.endswith("model.safetensors")]
    assert [wanted for wanted in ranges if wanted is not None] == [f"bytes={piece}-"]


def test_a_failed_fetch_keeps_the_files_that_are_whole(hub: HubServer, impatient: None) -> None:
    hub.add("someone/model", MODEL)
    hub.drop(r"GET .*/model\.safetensors$", after=0, times=10**6)
    with pytest.raises(NetworkError, match=r"cannot fetch 'someone/model'"):
        resolve("someone/model")
    hub.faults.clear()
    assert files_of(resolve("someone/model").path) == MODEL
    assert hub.count(r"GET .*/resolve/.*/config\.json$") == 1


def test_a_cached_model_outlives_its_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("someone/model", MODEL)
    first = resolve("someone/model")
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    assert resolve("someone/model") == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("someone/model") == first


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("stories", MissingInputError, "there is neither a folder 'stories' here nor a Hub repository 'stories'"),
        ("no/body", MissingInputError, "there is neither a folder 'no/body' here nor a Hub repository 'no/body'"),
        ("someone/model@v9", MissingInputError, "'someone/model' has no revision 'v9'"),
        ("someone/model@", MissingInputError, "names no revision"),
        ("someone/empty", MissingInputError, "holds neither config.json nor adapter_config.json"),
        ("someone/gated", NetworkError, "is gated: accept its licence"),
        ("a/b/c", MissingInputError, "a Hub repository cannot have that name"),
        ("two words", MissingInputError, "a Hub repository cannot have that name"),
        ("./none", MissingInputError, "there is no folder './none'"),
        ("../none", MissingInputError, "there is no folder '../none'"),
        ("/none/such", MissingInputError, "there is no folder '/none/such'"),
        ("~/none such", MissingInputError, "there is no folder '~/none such'"),
        ("models\\none", MissingInputError, "there is no folder"),
        ("", MissingInputError, "there is no folder ''"),
        ("x" * 5000, MissingInputError, "cannot look for the folder"),
        ("file.txt", MissingInputError, "'file.txt' is not a folder"),
        ("half", MissingInputError, "'half' is unfinished, its files lie in '.half.partial'"),
        (".half.partial", MissingInputError, "is unfinished"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(
    hub: HubServer, name: str, kind: type[QlorapipeError], sentence: str
) -> None:
    hub.add("someone/model", MODEL)
    hub.add("someone/empty", {"data.csv": b"1,2"})
    hub.add("someone/gated", MODEL, gated=True)
    write_files(Path(), {"file.txt": b"", ".half.partial/journal.jsonl": b""})
    with pytest.raises(kind) as fault:
        resolve(name)
    assert sentence in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, "refused with 401 (no entry for hf_*** or hf_*** and so on"),
        (403, "...); check the name, and set HF_TOKEN to a token that may do it."),
        (500, "answered 500"),
        (503, "answered 503"),
    ],
)
def test_a_hub_that_refuses_is_named_and_the_token_is_not(
    hub: HubServer, impatient: None, capfd: pytest.CaptureFixture[str], status: int, sentence: str
) -> None:
    hub.add("someone/model", MODEL)
    message = f"no entry for {hub.token} or hf_anotherSecret" + " and so on" * 99
    hub.fail("/api/", status=status, message=message)
    with pytest.raises(NetworkError) as fault:
        resolve("someone/model")
    assert sentence in str(fault.value)
    assert f"the Hub at {hub.url}" in str(fault.value)
    assert len(str(fault.value)) < 400
    assert str(hub.token) not in str(fault.value) + "".join(capfd.readouterr())


def test_a_wrong_token_is_told_apart_from_a_missing_model(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("someone/model", MODEL)
    monkeypatch.setenv("HF_TOKEN", "hf_thisOneIsNotValid")
    with pytest.raises(NetworkError, match="refused with 401"):
        resolve("someone/model")


def test_a_private_repository_needs_the_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("someone/model", MODEL, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(MissingInputError, match="for a private repository set HF_TOKEN"):
        resolve("someone/model")
    monkeypatch.setenv("HF_TOKEN", str(hub.token))
    assert files_of(resolve("someone/model").path) == MODEL


@pytest.mark.parametrize("body", [b"<html>not the Hub</html>", b"[]", b"{}", b'{"id": 7}', b"\xff\xfe", b""])
def test_an_answer_that_makes_no_sense_is_the_hubs_fault(hub: HubServer, body: bytes) -> None:
    hub.add("someone/model", MODEL)
    hub.answer("/api/", body)
    with pytest.raises(NetworkError, match="makes no sense"):
        resolve("someone/model")


def test_a_file_name_that_leaves_the_cache_is_passed_over(hub: HubServer, tmp_path: Path) -> None:
    hub.add("someone/model", MODEL | {"../../../../escaped.json": b"{}", "../config.json": b"{}"})
    assert files_of(resolve("someone/model").path) == MODEL
    assert not list(tmp_path.rglob("escaped.json"))


def test_without_a_connection_the_hub_is_named_but_not_its_password(
    hub: HubServer, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = closed_port()
    monkeypatch.setenv("HF_ENDPOINT", address.replace("//", "//me:secret@"))
    with pytest.raises(NetworkError, match="cannot fetch 'someone/model'") as fault:
        resolve("someone/model")
    assert address in str(fault.value)
    assert "secret" not in str(fault.value)
    # A path that was mistyped is a missing input, whether the Hub can be asked or not.
    Path("models").mkdir()
    for name in ("stories", "models/stories"):
        with pytest.raises(MissingInputError, match=f"there is no folder '{name}' here"):
            resolve(name)


def test_a_cache_that_cannot_be_written_is_a_matter_of_the_disk(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("someone/model", MODEL)
    (tmp_path / "in-the-way").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "in-the-way"))
    with pytest.raises(DiskError, match="in-the-way"):
        resolve("someone/model")


FETCH = """
import sys
from qlora_pipe.errors import QlorapipeError
from qlora_pipe.hub import resolve
for name in sys.argv[1:]:
    try:
        print(resolve(name).path)
    except QlorapipeError as fault:
        print("error", fault.exit_code, fault)
"""


def test_the_environment_alone_is_enough_and_the_hub_learns_nothing_else(hub: HubServer, tmp_path: Path) -> None:
    hub.add("someone/model", MODEL, private=True)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}

    def fetch(*names: str, **more: str) -> tuple[list[str], str]:
        command = [sys.executable, "-c", FETCH, *names]
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, check=True)
        return done.stdout.splitlines(), done.stderr

    (first,), messages = fetch("someone/model")
    # Without a terminal there is a line and no progress bar.
    assert messages == f"fetching what the cache lacks of someone/model from {hub.url}\n"
    assert files_of(Path(first)) == MODEL
    assert Path(first).is_relative_to(tmp_path / "home")
    agents = {request.headers["user-agent"] for request in hub.requests}
    assert not any("torch/" in agent or "agent/" in agent for agent in agents)
    asked = len(hub.requests)
    (again, missing), more_messages = fetch("someone/model", "someone/other", HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    assert again == first
    assert missing.startswith("error 66 there is no folder 'someone/other' here")
    assert str(hub.token) not in first + again + missing + messages + more_messages
