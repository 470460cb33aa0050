"""Data of the Hub: which files are fetched for which split, and what is said where there are none."""

import gzip
import json
import sys
from pathlib import Path

import pluggy
import pyarrow
import pytest
from huggingface_hub import constants

from qlora_pipe import hookspecs
from qlora_pipe.data.source import DataSource, find_source
from qlora_pipe.dataset import ANY_REPOSITORY, Dataset, Example, HubFiles, prompt_and_answer
from qlora_pipe.errors import ConfigError, DataError, MissingInputError, NetworkError, QlorapipeError, UsageProblem
from qlora_pipe.rows import BadRow, Row, table_rows
from tests.hub_server import HubServer, closed_port

pytest_plugins = ("tests.hub_fixtures",)

REPO = "datasets/someone/riddles"


def _example(row: Row) -> Example:
    return prompt_and_answer(row.text("prompt"), row.text("answer"), origin=row.origin)


class _Plugin:
    @hookspecs.hookimpl
    def register_datasets(self) -> list[Dataset]:
        splits = {"train": ("*/train.jsonl.gz",), "test": ("*/test.jsonl.gz",)}
        known = HubFiles(repo="someone/riddles", splits=splits)
        fields = ("prompt", "answer")
        return [
            Dataset(name="riddles", help="", rows=table_rows, example=_example, hub=known),
            Dataset(name="hub", help="", rows=table_rows, example=_example, hub=ANY_REPOSITORY, fields=fields),
            Dataset(name="lines", help="", rows=table_rows, example=_example, fields=fields),
        ]


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pluggy.PluginManager:
    monkeypatch.setenv("QLORA_PIPE_CACHE", str(tmp_path / "kept"))
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(_Plugin())
    return manager


def _lines(*answers: str) -> bytes:
    return b"".join(json.dumps({"prompt": "p", "answer": answer}).encode() + b"\n" for answer in answers)


def _answers(source: DataSource) -> list[str]:
    found = []
    for item in source.read():
        assert not isinstance(item, BadRow)
        found += [example.messages[-1].content for example in item[1]]
    return found


RIDDLES = {
    "easy/train.jsonl.gz": gzip.compress(_lines("a", "b")),
    "hard/train.jsonl.gz": gzip.compress(_lines("c")),
    "hard/test.jsonl.gz": gzip.compress(_lines("d")),
    "script.py": b"raise SystemExit",
    "README.md": b"riddles",
}


def test_a_name_alone_fetches_the_files_of_the_first_split_and_nothing_else(
    hub: HubServer, manager: pluggy.PluginManager
) -> None:
    commit = hub.add(REPO, RIDDLES)
    source = find_source("riddles", manager=manager)
    assert source.hub == {"repo": "someone/riddles", "revision": commit}
    assert source.names == ("easy/train.jsonl.gz", "hard/train.jsonl.gz")
    assert _answers(source) == ["a", "b", "c"]
    assert [item[0].origin for item in source.read() if not isinstance(item, BadRow)] == [
        "easy/train.jsonl.gz:1", "easy/train.jsonl.gz:2", "hard/train.jsonl.gz:1"
    ]  # fmt: skip
    assert hub.count(r"GET .*\.(py|md)$|GET .*test") == 0
    assert _answers(find_source("riddles", manager=manager, split="test")) == ["d"]


def test_a_revision_is_pinned_to_its_commit(hub: HubServer, manager: pluggy.PluginManager) -> None:
    old = hub.add(REPO, RIDDLES)
    new = hub.add(REPO, {"x/train.jsonl.gz": gzip.compress(_lines("new"))})
    assert _answers(find_source(f"riddles@{old}", manager=manager)) == ["a", "b", "c"]
    assert _answers(find_source("riddles", manager=manager)) == ["new"]
    assert _answers(find_source(f"hub:someone/riddles/easy@{old}", manager=manager)) == ["a", "b"]
    assert find_source("riddles@main", manager=manager).hub["revision"] == new


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-0.jsonl"], None, [0, 1]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-0.jsonl"], "test", [2]),
        (["train.json", "val.json", "dataset_infos.json", "README.md"], None, [0]),
        (["train.json", "val.json", "dataset_infos.json"], "validation", [1]),
        (["rows.csv.gz", "dev.csv.gz"], None, [0]),
        (["test/a.csv", "train/a.csv"], "test", [0]),
        # The last word counts: a set for training riddles by testers.
        (["test_riddles/train.csv", "test_riddles/test.csv"], None, [0]),
        (["en.train.csv", "en.challenge.csv"], "challenge", [1]),
        (["trainer.csv"], None, [0]),
    ],
)
def test_any_repository_s_split_is_found_by_the_words_in_its_names(
    hub: HubServer, manager: pluggy.PluginManager, names: list[str], split: str | None, expected: list[int]
) -> None:
    hub.add(REPO, dict.fromkeys(names, b"{}"))
    source = find_source("hub:someone/riddles", manager=manager, split=split)
    assert list(source.names) == [names[place] for place in expected]


@pytest.mark.parametrize(
    ("names", "split", "kind", "words"),
    [
        (["a/train.csv", "b/train.csv"], None, DataError, "in several folders ('a', 'b')"),
        (["train.csv", "train.parquet"], None, DataError, "as .csv and .parquet, which may be the same rows again"),
        (["train.csv", "test.csv"], "tset", UsageProblem, "has no split 'tset', did you mean 'test'?"),
        (["data.py"], None, DataError, "the dataset someone/riddles holds no file that ends in .jsonl, "),
        (["../train.csv", "/train.csv"], None, DataError, "holds no file that ends in .jsonl"),
    ],
)
def test_files_that_may_not_be_one_set_of_rows_are_refused(
    *,
    hub: HubServer,
    manager: pluggy.PluginManager,
    names: list[str],
    split: str | None,
    kind: type[QlorapipeError],
    words: str,
) -> None:
    hub.add(REPO, dict.fromkeys(names, b"{}"))
    with pytest.raises(kind) as caught:
        find_source("hub:someone/riddles", manager=manager, split=split)
    assert words in str(caught.value)


def test_files_that_are_no_tables_are_left_to_the_datasets_library(
    hub: HubServer, manager: pluggy.PluginManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pyarrow.table({"prompt": ["a", "b"], "answer": ["c", "d"], "turns": [[1], None]})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    hub.add(REPO, {"data/train.arrow": sink.getvalue().to_pybytes(), "riddles.py": b"raise SystemExit(3)"})
    source = find_source("hub:someone/riddles", manager=manager)
    assert _answers(source) == ["c", "d"]
    first = next(source.read())
    assert not isinstance(first, BadRow)
    assert (first[0].fields["turns"], first[0].origin) == ([1], f"{source.path.name}:row 1")
    assert hub.count(r"GET .*\.py$") == 0
    with pytest.raises(UsageProblem, match=r"has no split 'test' \(there are: train\)$"):
        _answers(find_source("hub:someone/riddles", manager=manager, split="test"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"is read by the datasets library: pip install 'qlora-pipe\[data\]'$"):
        _answers(source)


def test_a_split_that_the_dataset_does_not_name_is_a_usage_problem(
    hub: HubServer, manager: pluggy.PluginManager
) -> None:
    hub.add(REPO, RIDDLES)
    with pytest.raises(UsageProblem, match=r"has no split 'tests', did you mean 'test'\?\.$"):
        find_source("riddles", manager=manager, split="tests")
    hub.add(REPO, {"train.jsonl": b""})
    with pytest.raises(DataError, match=r"holds no file of the split 'test' \(\*/test\.jsonl\.gz\)$"):
        find_source("riddles", manager=manager, split="test")


@pytest.mark.parametrize("spec", ["hub:someone/nothing", "hub:someone/riddles@nothing"])
def test_what_the_hub_does_not_have_is_missing_input(hub: HubServer, manager: pluggy.PluginManager, spec: str) -> None:
    hub.add(REPO, RIDDLES)
    with pytest.raises(MissingInputError, match=rf"has no dataset '{spec[4:]}' that may be read: check it\.$"):
        find_source(spec, manager=manager)


@pytest.mark.parametrize("spec", ["hub:./rows.csv", "hub:a/b..c", "hub:-x/y"])
def test_what_cannot_be_a_repository_is_missing_input(hub: HubServer, manager: pluggy.PluginManager, spec: str) -> None:
    with pytest.raises(MissingInputError, match=r"cannot be a dataset of the Hub: write USER/NAME\.$"):
        find_source(spec, manager=manager)
    assert hub.requests == []


def test_out_of_reach_the_files_that_the_hub_named_last_come_from_its_cache(
    hub: HubServer, manager: pluggy.PluginManager, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    commit = hub.add(REPO, RIDDLES)
    find_source("riddles", manager=manager)
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    again = find_source("riddles", manager=manager)
    assert (_answers(again), again.hub["revision"]) == (["a", "b", "c"], commit)
    # Another split was never fetched, and half of one is never taken for all of it.
    with pytest.raises(NetworkError, match=r"^cannot fetch the dataset 'someone/riddles@.* cannot be reached"):
        find_source("riddles", manager=manager, split="test")
    with pytest.raises(NetworkError, match=r"^cannot fetch the dataset 'someone/other': the Hub at .* cannot be "):
        find_source("hub:someone/other", manager=manager)


def test_a_half_fetched_split_is_not_taken_for_whole_offline(
    hub: HubServer, manager: pluggy.PluginManager, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    hub.add(REPO, RIDDLES)
    hub.fail(r"GET .*hard/train", status=503)
    with pytest.raises(NetworkError, match="answered 503"):
        find_source("riddles", manager=manager)
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    with pytest.raises(NetworkError, match=r"cannot be reached"):
        find_source("riddles", manager=manager)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match=r"HF_HUB_OFFLINE is set; unset it"):
        find_source("riddles", manager=manager)


def test_a_folder_here_has_splits_as_one_of_the_hub_has(tmp_path: Path, manager: pluggy.PluginManager) -> None:
    for name, answer in (("train-1.csv", "a"), ("train-2.csv", "b"), ("test.csv", "c")):
        (tmp_path / name).write_text(f"prompt,answer\np,{answer}\n")
    spec = f"lines:{tmp_path}"
    assert _answers(find_source(spec, manager=manager)) == ["c", "a", "b"]
    assert _answers(find_source(spec, manager=manager, split="train")) == ["a", "b"]
    with pytest.raises(UsageProblem, match=r"test\.csv is one file, so it has no split 'test'"):
        find_source(f"lines:{tmp_path / 'test.csv'}", manager=manager, split="test")


def test_a_name_alone_of_data_that_is_not_on_the_hub_is_a_usage_problem(manager: pluggy.PluginManager) -> None:
    with pytest.raises(UsageProblem, match=r"the dataset lines is not on the Hub: write lines:PATH$"):
        find_source("lines", manager=manager)


def test_fields_may_be_named_where_the_dataset_lets_them(tmp_path: Path, manager: pluggy.PluginManager) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("q,a\np,b\n")
    fields = {"prompt": "q", "answer": "a"}
    mapped = find_source(f"lines:{path}", manager=manager, fields=fields)
    assert _answers(mapped) == ["b"]
    assert mapped.fingerprint("") != find_source(f"lines:{path}", manager=manager).fingerprint("")
    with pytest.raises(UsageProblem, match=r"^--map answr=a: .* lines has no field 'answr', did you mean 'answer'"):
        find_source(f"lines:{path}", manager=manager, fields={"answr": "a"})
    with pytest.raises(UsageProblem, match=r"^the fields of riddles have fixed names"):
        find_source(f"riddles:{path}", manager=manager, fields=fields)
