"""Loading NAME:PATH, its fingerprint, and the held-out share."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pluggy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_pipe import hookspecs
from qlora_pipe.data.encode import Sample
from qlora_pipe.data.samples import SampleSet, load_samples, split_held_out
from qlora_pipe.data.source import DataSource, find_source
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import Dataset, Example, prompt_and_answer
from qlora_pipe.errors import DataError, MissingInputError, UsageProblem
from qlora_pipe.rows import BadRow, Row
from tests.pipe.encoders import encoder_of


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        yield Row(fields={"line": line}, origin=f"{path.name}:{number}")


def _example(row: Row) -> Example:
    prompt, _, answer = row.text("line").partition("|")
    return prompt_and_answer(prompt, answer, origin=row.origin)


class _Plugin:
    @hookspecs.hookimpl
    def register_datasets(self) -> list[Dataset]:
        return [
            Dataset(name=name, help="prompt|answer, one a line", rows=_lines, example=_example)
            for name in ("bars", "pipes")
        ]


@pytest.fixture
def manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(_Plugin())
    return manager


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.txt"
    path.write_text("the: |yes\nthe: |no no no\nyes |no\n")
    return path


def _load(spec: str, tokenizer: Tokenizer, manager: pluggy.PluginManager, *, max_tokens: int = 8) -> SampleSet:
    return load_samples(spec, encoder=encoder_of(tokenizer, max_tokens=max_tokens), manager=manager)


def test_rows_become_samples_in_their_order(
    rows: Path, tiny_tokenizer: Tokenizer, manager: pluggy.PluginManager
) -> None:
    loaded = _load(f"bars:{rows}", tiny_tokenizer, manager)
    assert [sample.origin for sample in loaded.samples] == ["rows.txt:1", "rows.txt:2", "rows.txt:3"]
    lengths, targets = [6, 8, 5], [2, 3, 2]
    assert [len(sample.ids) for sample in loaded.samples] == lengths
    assert [int(sample.trained.sum()) for sample in loaded.samples] == targets
    stats = loaded.stats
    assert (stats.rows, stats.samples, stats.cut) == (3, 3, 1)
    assert (stats.tokens, stats.trained) == (sum(lengths), sum(targets))


def test_progress_counts_rows_by_batches_and_check_is_asked_before_each(
    rows: Path, tiny_tokenizer: Tokenizer, manager: pluggy.PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_pipe.data.build._BATCH_ROWS", 2)
    calls: list[object] = []
    load_samples(
        f"bars:{rows}", encoder=encoder_of(tiny_tokenizer, max_tokens=8), manager=manager,
        progress=lambda done, total: calls.append((done, total)), check=lambda: calls.append("check"),
    )  # fmt: skip
    assert calls == ["check", "check", (2, None), "check", (3, None)]


def test_what_check_raises_stops_the_load(rows: Path, tiny_tokenizer: Tokenizer, manager: pluggy.PluginManager) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_samples(f"bars:{rows}", encoder=encoder_of(tiny_tokenizer, max_tokens=8), manager=manager, check=stop)


@pytest.mark.parametrize("spec", ["rows.txt", ":rows.txt", "bars:", ""])
def test_spec_of_another_form_is_a_usage_problem(spec: str, manager: pluggy.PluginManager) -> None:
    with pytest.raises(UsageProblem) as caught:
        find_source(spec, manager=manager)
    assert str(caught.value) == (
        f"{spec!r} does not name data: write NAME:PATH, such as alpaca:train.json (installed: bars, pipes)"
    )


def test_unknown_dataset_is_a_usage_problem(rows: Path, manager: pluggy.PluginManager) -> None:
    with pytest.raises(UsageProblem, match=r"no dataset named 'csv' \(installed: bars, pipes\)"):
        find_source(f"csv:{rows}", manager=manager)


def test_absent_path_is_missing_input(tmp_path: Path, manager: pluggy.PluginManager) -> None:
    with pytest.raises(MissingInputError, match=r"^no file or folder at .*/nowhere\.txt \(asked for by bars:"):
        find_source(f"bars:{tmp_path}/nowhere.txt", manager=manager)


def test_colons_in_a_path_belong_to_it(tmp_path: Path, manager: pluggy.PluginManager) -> None:
    path = tmp_path / "a:b.txt"
    path.touch()
    assert find_source(f"bars:{path}", manager=manager).path == path


def test_dataset_without_rows_is_a_data_error(
    tmp_path: Path, tiny_tokenizer: Tokenizer, manager: pluggy.PluginManager
) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt holds no rows$"):
        _load(f"bars:{tmp_path}/empty.txt", tiny_tokenizer, manager)


def test_fingerprint_is_the_same_for_the_same_samples_under_another_name(
    rows: Path, tiny_tokenizer: Tokenizer, manager: pluggy.PluginManager
) -> None:
    def fingerprint(path: Path) -> str:
        source = find_source(f"bars:{path}", manager=manager)
        return source.fingerprint(encoder_of(tiny_tokenizer, max_tokens=8).fingerprint)

    first = fingerprint(rows)
    moved = rows.rename(rows.with_name("moved.txt"))
    assert fingerprint(moved) == first
    assert len(bytes.fromhex(first)) == 32


def test_fingerprint_changes_with_bytes_dataset_tokenizer_and_length(
    rows: Path, tiny_tokenizer: Tokenizer, manager: pluggy.PluginManager
) -> None:
    def fingerprint(name: str = "bars", tokenizer: Tokenizer = tiny_tokenizer, max_tokens: int = 8) -> str:
        source = find_source(f"{name}:{rows}", manager=manager)
        return source.fingerprint(encoder_of(tokenizer, max_tokens=max_tokens).fingerprint)

    without_bos = Tokenizer(
        bos_id=None, eos_id=2, vocab_size=299, digest=tiny_tokenizer.digest, inner=tiny_tokenizer.inner
    )
    other_file = Tokenizer(bos_id=1, eos_id=2, vocab_size=299, digest="00", inner=tiny_tokenizer.inner)
    found = [
        fingerprint(), fingerprint(name="pipes"), fingerprint(max_tokens=9),
        fingerprint(tokenizer=without_bos), fingerprint(tokenizer=other_file),
    ]  # fmt: skip
    rows.write_text(rows.read_text() + "\n")
    found.append(fingerprint())
    assert len(set(found)) == len(found)


def test_fingerprint_of_a_folder_follows_names_and_bytes(
    tmp_path: Path, tiny_tokenizer: Tokenizer, manager: pluggy.PluginManager
) -> None:
    def fingerprint() -> str:
        source = find_source(f"bars:{folder}", manager=manager)
        return source.fingerprint(encoder_of(tiny_tokenizer, max_tokens=8).fingerprint)

    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")
    found = [fingerprint()]
    (folder / "b.txt").rename(folder / "c.txt")
    found.append(fingerprint())
    (folder / "c.txt").write_text("too")
    found.append(fingerprint())
    assert len(set(found)) == 3
    folder = folder.rename(tmp_path / "moved")
    assert fingerprint() == found[-1]


def test_the_first_example_that_can_be_used_shows_the_form(rows: Path) -> None:
    def read(path: Path) -> Iterator[Row | BadRow]:
        yield BadRow(reason="unreadable", raw=b"")
        yield from _lines(path)

    def example(row: Row) -> list[Example]:
        if row.origin == "rows.txt:1":
            row.refuse("line", "is not liked")
        return [_example(row)] if row.origin == "rows.txt:3" else []

    source = DataSource(dataset=Dataset(name="bars", help="", rows=read, example=example), path=rows)
    found = source.first_example()
    assert found is not None
    assert (found.origin, found.form) == ("rows.txt:3", "plain")
    rows.write_text("")
    assert source.first_example() is None


def _samples(count: int) -> list[Sample]:
    return [
        Sample(ids=np.array([1, 2], dtype=np.int32), trained=np.array([False, True]), origin=f"x:{number}")
        for number in range(count)
    ]


@given(count=st.integers(1, 300), share=st.floats(0, 0.999), seed=st.integers(0, 2**70))
def test_split_holds_out_the_share_and_loses_nothing(count: int, share: float, seed: int) -> None:
    samples = _samples(count)
    train, held_out = split_held_out(samples, share=share, seed=seed)
    assert len(held_out) == min(round(share * count), count - 1)
    place = {id(sample): number for number, sample in enumerate(samples)}
    places = [[place[id(sample)] for sample in part] for part in (train, held_out)]
    assert sorted(places[0] + places[1]) == list(range(count))
    assert places == [sorted(part) for part in places]


def test_split_follows_the_seed_and_stays_the_same_for_ever() -> None:
    def drawn(seed: int) -> list[str]:
        return [sample.origin for sample in split_held_out(_samples(50), share=0.1, seed=seed)[1]]

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(20)}) == 20
    # Runs are continued by later versions; these draws must not move.
    assert drawn(0) == ["x:2", "x:3", "x:11", "x:13", "x:20"]


@pytest.mark.parametrize("packaged", [True, False], ids=["package", "module"])
def test_samples_are_made_anew_when_the_plugins_code_or_what_lies_beside_it_changes(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packaged: bool
) -> None:
    folder = tmp_path / "code" / "riddle_plugin" if packaged else tmp_path / "code"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "riddle_helper.py").write_text("LENGTH = 1\n")
    (folder / "riddle_reader.py").write_text("def example(row):\n    return ()\n")
    monkeypatch.syspath_prepend(tmp_path / "code")
    module = importlib.import_module("riddle_plugin.riddle_reader" if packaged else "riddle_reader")
    source = DataSource(dataset=Dataset(name="riddles", help="", example=module.example), path=rows)
    before = source.code
    assert source.code == before
    (folder / "riddle_helper.py").write_text("LENGTH = 2\n")
    assert (source.code != before) is packaged
    (folder / "riddle_reader.py").write_text("def example(row):\n    return []\n")
    assert source.code != before
    monkeypatch.delitem(sys.modules, module.__name__)
