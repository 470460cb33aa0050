"""Each instruction dataset by its name alone: fetched from where it was published, the files of the split asked for."""

import random
from pathlib import Path

import pytest

from qlora_pipe.data.source import find_source
from qlora_pipe.plugins import load_plugins
from qlora_pipe.rows import BadRow
from tests.hostile.fuzzed_sources import SOURCES
from tests.hub_server import HubServer
from tests.plugins.table_files import write_table

pytest_plugins = ("tests.hub_fixtures",)

_PARTS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
# Name, split or None for the first, repository, the files that are read, and others that lie there too.
HUB: list[tuple[str, str | None, str, list[str], list[str]]] = [
    ("alpaca", None, "tatsu-lab/alpaca", ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"], []),
    ("alpaca-cleaned", None, "yahma/alpaca-cleaned", ["alpaca_data_cleaned.json"], []),
    ("chip2", None, "laion/OIG", ["unified_chip2.jsonl"], ["unified_basic.jsonl", "files/unified_chip2.jsonl.gz"]),
    ("flan-v2", None, "Muennighoff/flan", ["train/a_train.jsonl", "train/b_train.jsonl"], ["test/a_test.jsonl"]),
    ("flan-v2", "validation", "Muennighoff/flan", ["validation/a_validation.jsonl"], ["train/a_train.jsonl"]),
    (
        *("hh-rlhf", None, "Anthropic/hh-rlhf", [f"{part}/train.jsonl.gz" for part in _PARTS]),
        ["red-team-attempts/red_team_attempts.jsonl.gz", *(f"{part}/test.jsonl.gz" for part in _PARTS)],
    ),
    ("hh-rlhf", "test", "Anthropic/hh-rlhf", [f"{part}/test.jsonl.gz" for part in _PARTS], ["x/test.jsonl.gz"]),
    ("longform", None, "akoksal/LongForm", ["dataset/train.json"], ["dataset/val.json", "dataset/test.json"]),
    ("longform", "val", "akoksal/LongForm", ["dataset/val.json"], ["dataset/train.json"]),
    (
        *("oasst1", None, "timdettmers/openassistant-guanaco", ["openassistant_best_replies_train.jsonl"]),
        ["openassistant_best_replies_eval.jsonl"],
    ),
    ("oasst1", "eval", "timdettmers/openassistant-guanaco", ["openassistant_best_replies_eval.jsonl"], []),
    (
        *("self-instruct", None, "HuggingFaceH4/self_instruct", ["data/train-00000-of-00001.parquet"]),
        ["data/test-00000-of-00001.parquet", "dataset_infos.json"],
    ),
    ("self-instruct", "test", "HuggingFaceH4/self_instruct", ["data/test-00000-of-00001.parquet"], []),
    ("unnatural-instructions", None, "mrm8488/unnatural-instructions-core", ["data/train-0-of-1-67e9.parquet"], []),
    ("unnatural-instructions-full", None, "mrm8488/unnatural-instructions-full", ["data/train-0-of-1.parquet"], []),
]
# The schema of what lies there, where another name than the dataset's goes with it.
_SCHEMA = {
    "alpaca-cleaned": "alpaca",
    "oasst1": "oasst1 text",
    "self-instruct": "self-instruct pairs",
    "unnatural-instructions-full": "unnatural-instructions",
}


@pytest.mark.parametrize(
    ("name", "split", "repo", "read", "left"), HUB, ids=[f"{name} {split or 'first'}" for name, split, *_ in HUB]
)
def test_a_dataset_is_fetched_from_where_it_was_published(
    *, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, name: str, split: str | None, repo: str,
    read: list[str], left: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("QLORA_PIPE_CACHE", str(tmp_path / "kept"))
    rng = random.Random(name)
    good = SOURCES[_SCHEMA.get(name, name)].rows.good
    files = {file: write_table(tmp_path / "made" / file, [good(rng) for _ in range(5)]).read_bytes() for file in read}
    hub.add(f"datasets/{repo}", {**files, **dict.fromkeys([*left, "README.md"], b"not to be read")})
    source = find_source(name, manager=load_plugins(), split=split)
    assert source.hub["repo"] == repo
    assert source.names == tuple(read)
    rows = list(source.read())
    assert not any(isinstance(row, BadRow) for row in rows)
    assert len(rows) == 5 * len(read)
    assert hub.count(r"GET .*README\.md$") == 0
