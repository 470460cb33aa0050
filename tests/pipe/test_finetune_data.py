"""Fine-tuning on data that is mapped, split or kept, or holds rows that can't be used, through the command line."""

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from qlora_formats.manifest import Manifest
from qlora_pipe.cli import execute
from qlora_pipe.data.encode import Encoder
from qlora_pipe.dataset import Example
from qlora_pipe.settings import read_yaml
from tests.hub_server import HubServer
from tests.pipe.runs import SETTINGS, command, contents, metrics, small_checkpoint, write_rows

pytest_plugins = ("tests.hub_fixtures",)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def _train(base: Path, data: str, out: Path, **settings: object) -> Path:
    assert execute(command("finetune", base, data=data, out=out, **{**SETTINGS, **settings})) == 0
    return out


def _learnt(run: Path) -> tuple[bytes, list[object]]:
    """What two runs on the same samples have in common: the adapter's bytes, and losses to the last bit."""
    steps = [(step["loss"], step["grad_norm"], step.get("eval_loss")) for step in metrics(run)]
    return (run / "final" / "adapter_model.safetensors").read_bytes(), list(steps)


def test_a_packed_table_with_other_names_trains_as_the_plain_rows_do(base: Path, rows: Path, tmp_path: Path) -> None:
    fields = [json.loads(line) for line in rows.read_text().splitlines()]
    table = tmp_path / "table.csv.gz"
    with gzip.open(table, "wt", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("reply", "question"), *((row["answer"], row["prompt"]) for row in fields)])
    plain = _train(base, f"jsonl:{rows}", tmp_path / "plain")
    mapped = _train(base, f"csv:{table}", tmp_path / "mapped", map="prompt=question,answer=reply")
    assert _learnt(mapped) == _learnt(plain)
    assert not (mapped / "quarantine.jsonl").exists()


def test_bad_rows_are_skipped_counted_and_kept_and_the_others_train_as_a_clean_file(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = rows.read_text().splitlines()
    spoilt = tmp_path / "spoilt.jsonl"
    spoilt.write_text("\n".join([lines[0], "{", *lines[1:], '{"prompt": "a"}']))
    line = command("finetune", base, data=f"jsonl:{spoilt}", out=tmp_path / "run", **SETTINGS)
    assert execute(line) == 65
    assert "error: spoilt.jsonl:2: not valid JSON at column 2: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert execute([*line, "--on-bad-row", "skip"]) == 0
    note = "2 of 15 rows can't be used and are left out: quarantine.jsonl in the run's folder has each of them"
    assert note in capsys.readouterr().err
    kept = [json.loads(each) for each in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [each["row"] for each in kept] == ["{", '{"prompt": "a"}']
    assert [each["reason"].partition(": ")[0] for each in kept] == ["spoilt.jsonl:2", "spoilt.jsonl:15"]
    assert _learnt(tmp_path / "run") == _learnt(_train(base, f"jsonl:{rows}", tmp_path / "clean"))
    before = contents(tmp_path / "run")
    assert execute([*line, "--on-bad-row", "skip"]) == 0
    assert contents(tmp_path / "run") == before


def test_a_second_run_on_the_same_rows_tokenises_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", count=17)
    first = _train(base, f"jsonl:{rows}", tmp_path / "first")

    def encode(encoder: Encoder, examples: Sequence[Example]) -> None:
        raise AssertionError(f"{len(examples)} examples are encoded again")

    monkeypatch.setattr(Encoder, "encode", encode)
    second = _train(base, f"jsonl:{rows}", tmp_path / "second")
    assert contents(second / "final") == contents(first / "final")
    # Another length makes other samples.
    third = command("finetune", base, data=f"jsonl:{rows}", out=tmp_path / "third", **SETTINGS, max_tokens=99)
    assert execute(third) == 70
    assert "17 examples are encoded again" in capsys.readouterr().err


def test_splits_of_a_folder_are_the_files_by_themselves(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    train, test = write_rows(folder / "train.jsonl"), write_rows(folder / "test.jsonl", count=5)
    named = _train(base, f"jsonl:{train}", tmp_path / "named", eval_data=f"jsonl:{test}")
    split = _train(base, f"jsonl:{folder}", tmp_path / "split", split="train", eval_split="test")
    assert _learnt(split) == _learnt(named)
    assert contents(split / "final") == contents(named / "final")


def test_data_settings_are_yaml_keys_and_part_of_the_run(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(rows.read_text().replace('"prompt"', '"q"'))
    settings = "".join(f"{name}: {value}\n" for name, value in SETTINGS.items())
    text = (
        f"base: {base}\ndata: jsonl:{renamed}\nout: {tmp_path / 'run'}\nmap: [prompt=q]\non_bad_row: skip\n{settings}"
    )
    (tmp_path / "run.yaml").write_text(text)
    assert execute(["finetune", str(tmp_path / "run.yaml")]) == 0
    resolved = read_yaml(tmp_path / "run" / "config.resolved.yaml")
    assert (resolved["map"], resolved["on_bad_row"], "eval_map" in resolved) == (["prompt=q"], "skip", False)
    # What is done with bad rows may change, for there are none; what is read may not.
    assert execute(["finetune", str(tmp_path / "run.yaml"), "--on-bad-row", "fail"]) == 0
    capsys.readouterr()
    assert execute(["finetune", str(tmp_path / "run.yaml"), "--map", "prompt=q,messages=m"]) == 73
    assert "was made from other inputs or settings: data was " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"map": "promt=a"}, "--map promt=a: the dataset jsonl has no field 'promt', did you mean 'prompt'?"),
        ({"map": "prompt"}, "--map takes OWN=THEIRS, such as prompt=question, and was given 'prompt'."),
        ({"map": "prompt=a,prompt=b"}, "--map names the field 'prompt' twice."),
        ({"split": "test"}, "is one file, so it has no split 'test'"),
        ({"eval_split": "test", "held_out": 0.5}, "held_out and eval_split exclude each other"),
    ],
)
def test_data_settings_that_make_no_sense_are_usage_problems(
    *, base: Path, rows: Path, tmp_path: Path, settings: dict[str, object], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    line = command("finetune", base, data=f"jsonl:{rows}", out=tmp_path / "run", **{**SETTINGS, **settings})
    assert execute(line) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_of_the_hub_is_trained_on_and_its_commit_recorded(
    hub: HubServer, base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add("datasets/someone/counting", {"data/train.jsonl": rows.read_bytes(), "README.md": b"numbers"})
    fetched = _train(base, "hub:someone/counting", tmp_path / "fetched")
    assert f"note: the data is someone/counting of the Hub at its commit {commit}." in capsys.readouterr().err
    assert _learnt(fetched) == _learnt(_train(base, f"jsonl:{rows}", tmp_path / "local"))
    manifest = Manifest.read(fetched / "final")
    assert manifest.fields["data"] == [{"repo": "someone/counting", "revision": commit}]
    assert "data" not in Manifest.read(tmp_path / "local" / "final").fields
