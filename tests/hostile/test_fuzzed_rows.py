"""10,000 damaged rows of 16 classes among good ones: each is named with its reason, and the good ones are unharmed."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import NamedTuple

import pytest

from qlora_pipe.cli import execute
from qlora_pipe.dataset import Dataset, Example
from qlora_pipe.errors import DataError
from qlora_pipe.rows import BadRow
from tests.hostile.fuzzed_sources import SOURCES, Source
from tests.hostile.row_damage import DAMAGES, encoded
from tests.pipe.runs import command, small_checkpoint

COUNT = 10_000
# A class whose rows are a MiB each comes once in so many rounds.
ROUNDS_PER_LONG_ROW = 10


class Mixed(NamedTuple):
    """A file of good rows and bad ones."""

    path: Path
    bad: list[tuple[int, str]]
    """Line and reason, a regular expression, of each bad row."""
    good: list[int]
    """Lines of the good rows."""
    classes: Counter[str]


def classes() -> Iterator[str]:
    """The class of each bad row, for ever."""
    for number in cycle(range(ROUNDS_PER_LONG_ROW)):
        yield from (name for name in DAMAGES if number == 0 or name != "longer than 1 MiB")


def mix(folder: Path, name: str, source: Source, *, count: int) -> tuple[Mixed, Path]:
    """Write `count` bad rows among about as many good ones; and the good ones alone, on lines of the same bytes."""
    rng = random.Random(name)
    mixed = Mixed(folder / "mixed.jsonl", [], [], Counter())
    clean = folder / "clean.jsonl"
    with mixed.path.open("wb") as both, clean.open("wb") as good:
        line_end = rng.choice([b"\n", b"\r\n"])
        both.write(rng.choice([b"", b"\xef\xbb\xbf"]))
        number = 0
        for damage in islice(classes(), count):
            mixed.classes[damage] += 1
            # The first row is good: a file that begins with a bracket would be one array.
            for _ in range(rng.randrange(3) or number == 0):
                number += 1
                line = encoded(rng, source.rows.good(rng)) + line_end
                both.write(line)
                good.write(line)
                mixed.good.append(number)
            if rng.random() < 0.05:
                number += 1
                both.write(rng.choice([b"", b" ", b"\t "]) + line_end)
            number += 1
            bad = DAMAGES[damage](rng, source.rows.good(rng), source)
            both.write(bad.line + line_end)
            mixed.bad.append((number, bad.reason))
    return mixed, clean


def read(dataset: Dataset, path: Path) -> tuple[list[Example], list[str]]:
    """The examples of all rows that can be used, and the reasons of all others."""
    found: list[tuple[Example, ...]] = []
    reasons: list[str] = []
    for row in dataset.rows(path):
        if isinstance(row, BadRow):
            reasons.append(row.reason)
            continue
        try:
            given = dataset.example(row)
            found.append((given,) if isinstance(given, Example) else tuple(given))
        except DataError as fault:
            reasons.append(str(fault))
    return list(chain.from_iterable(found)), reasons


@pytest.mark.parametrize("name", SOURCES)
def test_bad_rows_are_named_and_good_ones_are_as_in_a_clean_file(
    tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    source = SOURCES[name]
    mixed, clean = mix(tmp_path, name, source, count=COUNT // len(SOURCES) + 1)
    examples, reasons = read(source.dataset, mixed.path)
    assert len(reasons) == len(mixed.bad)
    for reason, (line, expected) in zip(reasons, mixed.bad, strict=True):
        assert re.match(rf"mixed\.jsonl:{line}: ([\w\[\]]+: )*{expected}", reason), (line, expected, reason)
        assert "\n" not in reason
        assert len(reason) < 300
    wanted, none = read(source.dataset, clean)
    assert none == []
    assert wanted
    line_of = dict(enumerate(mixed.good, start=1))
    assert examples == [_moved(example, line_of) for example in wanted]
    assert len(mixed.classes) == len(DAMAGES)
    record_property(
        "counted", f"fuzzed rows of {name}: {len(reasons):,} bad ones named, {len(mixed.good):,} good ones kept"
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    assert execute(["quantize", str(small_checkpoint(folder / "base")), str(folder / "store")]) == 0
    return folder / "store"


@pytest.mark.parametrize("name", SOURCES)
def test_good_rows_among_bad_ones_train_as_a_clean_file_would(tmp_path: Path, store: Path, name: str) -> None:
    source = SOURCES[name]
    mixed, clean = mix(tmp_path, name, source, count=3 * len(DAMAGES))
    adapters = []
    for data in (mixed.path, clean):
        line = command(
            "finetune", store, data=f"{source.dataset.name}:{data}", out=tmp_path / data.stem, on_bad_row="skip",
            steps=2, batch_size=2, max_tokens=1024, rank=2, learning_rate=1e-2, device="cpu",
        )  # fmt: skip
        assert execute(line) == 0
        adapters.append((tmp_path / data.stem / "final" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    kept = [json.loads(line) for line in (tmp_path / "mixed" / "quarantine.jsonl").read_text().splitlines()]
    assert len(kept) == len(mixed.bad)
    for bad, (line_number, expected) in zip(kept, mixed.bad, strict=True):
        assert re.match(rf"mixed\.jsonl:{line_number}: ([\w\[\]]+: )*{expected}", bad["reason"]), bad["reason"]
    assert not (tmp_path / "clean" / "quarantine.jsonl").exists()


def _moved(example: Example, line_of: dict[int, int]) -> Example:
    """An example of the clean file, as it stands in the mixed one."""
    origin = re.sub(r"^clean\.jsonl:(\d+)", lambda found: f"mixed.jsonl:{line_of[int(found[1])]}", example.origin)
    return replace(example, origin=origin)


def test_ten_thousand_rows_of_sixteen_classes_are_fuzzed() -> None:
    assert len(DAMAGES) == 16
    assert len(SOURCES) * (COUNT // len(SOURCES) + 1) >= 10_000
