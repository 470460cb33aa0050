"""The datasets of common forms: what each row becomes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pluggy
import pytest

from qlora_pipe.data.samples import load_samples
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import Example, Message
from qlora_pipe.errors import DataError
from qlora_pipe.plugins import datasets, find_dataset, plugins_of
from qlora_plugins import datasets as plugin
from tests.pipe.encoders import encoder_of


@pytest.fixture
def manager() -> pluggy.PluginManager:
    return plugins_of(plugin)


def _read(manager: pluggy.PluginManager, name: str, path: Path) -> list[Example]:
    return list(find_dataset(manager, name).read(path))


def test_datasets_come_through_the_hook(manager: pluggy.PluginManager) -> None:
    assert {"csv", "hub", "jsonl", "parquet", "text"} <= datasets(manager).keys()


def test_datasets_import_neither_torch_nor_a_tokenizer() -> None:
    code = "import sys, qlora_plugins.datasets; sys.exit(bool({'torch', 'tokenizers', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )


def test_jsonl_takes_pairs_and_conversations_in_one_file(manager: pluggy.PluginManager, tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    path = tmp_path / "rows.jsonl"
    first = json.dumps({"prompt": "2+2=", "answer": "4", "source": "school"})
    # A byte order mark, Windows line ends, a blank line, and no line end at the end.
    path.write_bytes(b"\xef\xbb\xbf" + first.encode() + b"\r\n\r\n" + json.dumps({"messages": turns}).encode())
    assert _read(manager, "jsonl", path) == [
        Example(
            messages=(Message(role="user", content="2+2="), Message(role="assistant", content="4")),
            origin="rows.jsonl:1",
            form="plain",
        ),
        Example(
            messages=(
                Message(role="system", content=""),
                Message(role="user", content="Hi"),
                Message(role="assistant", content="Ho"),
            ),
            origin="rows.jsonl:3",
        ),
    ]


def test_text_file_is_one_document_with_its_line_ends(manager: pluggy.PluginManager, tmp_path: Path) -> None:
    path = tmp_path / "tale.txt"
    path.write_bytes("\ufeffOnce\r\nupon é\n".encode())
    assert _read(manager, "text", path) == [
        Example(messages=(Message(role="text", content="Once\r\nupon é\n"),), origin="tale.txt")
    ]


def test_text_folder_is_one_document_per_txt_file_in_order(manager: pluggy.PluginManager, tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d.txt").mkdir()
    assert [example.origin for example in _read(manager, "text", tmp_path)] == ["a.txt", "b.txt"]


def test_span_corruption_reads_what_text_reads_and_says_what_is_to_become_of_it(
    manager: pluggy.PluginManager, tmp_path: Path
) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    expected = [replace(example, form="span-corruption") for example in _read(manager, "text", tmp_path)]
    assert _read(manager, "span-corruption", tmp_path) == expected


def test_text_that_cannot_be_used_is_named(manager: pluggy.PluginManager, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no file that ends in \.txt$"):
        _read(manager, "text", tmp_path)
    path = tmp_path / "tale.txt"
    path.write_bytes(b"  \n")
    with pytest.raises(DataError, match=r"^tale\.txt: the file holds no text$"):
        _read(manager, "text", tmp_path)
    path.write_bytes(b"once\nupon \xff")
    with pytest.raises(DataError, match=r"^tale\.txt:2: not UTF-8: byte 6 of the line is 0xff$"):
        _read(manager, "text", tmp_path)


@pytest.mark.parametrize(
    ("spec", "rows"),
    [("alpaca:alpaca/alpaca_schema_from_seed_tasks_175.json", 175), ("text:tinyshakespeare/input.txt", 1)],
)
def test_real_data_loads(shared_data: Path, manager: pluggy.PluginManager, spec: str, rows: int) -> None:
    name, _, place = spec.partition(":")
    tokenizer = Tokenizer.open(shared_data / "models" / "stories260K")
    loaded = load_samples(
        f"{name}:{shared_data / 'datasets' / place}", encoder=encoder_of(tokenizer, max_tokens=8192), manager=manager
    )
    assert loaded.stats.rows == rows
    if name == "text":
        text = (shared_data / "datasets" / place).read_bytes().decode()
        targets = [int(token) for sample in loaded.samples for token in sample.ids[sample.trained]]
        assert targets == [*tokenizer.encode(text)[0], tokenizer.eos_id]
    else:
        assert loaded.stats.cut == 0
        assert all(sample.ids.tolist().count(tokenizer.eos_id) == 1 for sample in loaded.samples)
        assert all(sample.ids[-1] == tokenizer.eos_id and sample.trained[-1] for sample in loaded.samples)
