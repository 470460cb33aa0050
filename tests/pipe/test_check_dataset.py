"""The conformance suite of datasets: good ones pass, and each promise that is broken is found and named."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe.dataset import Dataset, Example, Message, prompt_and_answer
from qlora_pipe.errors import DataError
from qlora_pipe.plugins import find_dataset, load_plugins
from qlora_pipe.rows import BadRow, Row, json_lines
from qlora_pipe.skeleton.riddles import DATASET
from qlora_pipe.testing import BrokenPromise, check_dataset

READS = itertools.count()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A good row, one that is bad, and a good one again."""
    path = tmp_path / "rows.jsonl"
    good = [{"question": f"What is {number}?", "answer": f"{number}"} for number in (1, 2)]
    path.write_text(f"{json.dumps(good[0])}\n{{\n{json.dumps(good[1])}\n")
    return path


def made(change: Callable[[Example, Row], Any], **fields: Any) -> Dataset:
    """The riddles, with their examples changed."""
    return replace(DATASET, example=lambda row: change(DATASET.example(row), row), **fields)


def says(*turns: tuple[Any, Any]) -> Dataset:
    """A dataset whose rows all say the same."""
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return made(lambda example, _: replace(example, messages=messages))


def read_as(change: Callable[[Row | BadRow], Any]) -> Dataset:
    """The riddles, with their rows changed."""
    return replace(DATASET, rows=lambda path: (change(row) for row in json_lines(path)))


def shuffled(path: Path) -> Iterator[Row | BadRow]:
    found = list(json_lines(path))
    return iter(found[:: -1 if next(READS) % 2 else 1])


def stops_at_a_fault(path: Path) -> Iterator[Row | BadRow]:
    for row in json_lines(path):
        yield row
        if isinstance(row, BadRow):
            return


def careless(row: Row) -> Example:
    return prompt_and_answer(row.fields["question"], row.text("answer"), origin=row.origin)


def own_rows(path: Path) -> Iterator[Row | BadRow]:
    return json_lines(path)


def trusting(row: Row) -> Example:
    return prompt_and_answer(row.text("question"), row.fields.get("answer", ""), origin=row.origin)


def nameless(row: Row) -> Example:
    try:
        return DATASET.example(row)  # type: ignore[return-value]
    except DataError as fault:
        raise DataError("the row is bad") from fault


BROKEN: dict[str, tuple[Dataset, str]] = {
    "no function": (replace(DATASET, example=None), "example is None; it must be a function"),
    "no help": (replace(DATASET, help=3), "help is 3; it must be a text"),
    "no order": (replace(DATASET, rows=shuffled), "two readings of one file give other rows"),
    "no row": (read_as(lambda row: {"question": "x"}), "rows yields a dict; it must be a Row or a BadRow"),
    "no place": (read_as(lambda row: replace(row, origin="row") if isinstance(row, Row) else row), "stands at 'row'"),
    "no line": (
        read_as(lambda row: BadRow(reason="bad", raw=b"") if isinstance(row, BadRow) else row),
        "stands at 'bad': it must begin with FILE:LINE",
    ),
    "reads nothing": (replace(DATASET, rows=lambda _: iter(())), "gives no example: name a file with rows"),
    "refuses all": (replace(DATASET, example=lambda row: row.refuse("question", "is no good")), "gives no example"),
    "falls over": (replace(DATASET, rows=lambda path: iter([1 // 0])), "rows raises ZeroDivisionError"),
    "by chance": (made(lambda e, _: replace(e, form=f"{next(READS)}")), "other examples the second time"),
    "no example": (made(lambda e, _: ["text"]), "example gives a str; it must be an Example or several"),
    "elsewhere": (made(lambda e, _: replace(e, origin="here")), "says that it stands at 'here': pass on row.origin"),
    "a list": (made(lambda e, _: replace(e, messages=[*e.messages])), "messages that are no tuple of Message"),
    "another role": (says(("human", "a"), ("assistant", "b")), "the role 'human'; roles are system, user, assistant"),
    "no text": (says(("user", 3), ("assistant", "b")), "has content that is not text"),
    "no answer": (says(("user", "a")), "ends with user: what is trained on is the assistant's"),
    "nothing said": (says(), "ends with none"),
    "a form": (made(lambda e, _: replace(e, form=3)), "has the form 3, no name"),
    "a text and a turn": (says(("text", "a"), ("assistant", "b")), "can't be trained on: .* text alone, or the turns"),
    "an empty answer": (says(("user", "a"), ("assistant", "")), "can't be trained on: .* no token of the answer"),
    "careless": (replace(DATASET, example=careless), r"example raises KeyError \('question'\) on rows.jsonl:1"),
    "trusting": (replace(DATASET, example=trusting, fields=()), "has content that is not text"),
    "nameless": (replace(DATASET, example=nameless), "refuses rows.jsonl:1 with 'the row is bad'"),
    "a field twice": (replace(DATASET, fields=("question", "question")), "one of them stands twice"),
    "a field unread": (replace(DATASET, fields=("answer", "reply")), "fields name 'reply', which no row here is asked"),
    "a field unwritable": (replace(DATASET, fields=("a=b",)), "field 'a=b' can't be written on a command line"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_named(name: str, rows: Path) -> None:
    dataset, sentence = BROKEN[name]
    with pytest.raises(BrokenPromise, match=sentence) as raised:
        check_dataset(dataset, rows)
    assert str(raised.value).startswith("riddles: ")


def test_reading_that_ends_at_a_bad_row_is_found_where_rows_are_lines(rows: Path, monkeypatch: Any) -> None:
    good = rows.read_text().splitlines()
    rows.write_text("\n".join([good[0], good[2]]))
    check_dataset(DATASET, rows)
    monkeypatch.setattr("qlora_pipe.testing.dataset.json_rows", stops_at_a_fault)
    with pytest.raises(BrokenPromise, match="after a row that can't be read it gives 2 rows of 3"):
        check_dataset(replace(DATASET, rows=stops_at_a_fault), rows)


def test_a_good_dataset_passes(rows: Path) -> None:
    check_dataset(DATASET, rows)
    first, second = (
        prompt_and_answer(f"What is {number}? ", f"{number}", origin=f"rows.jsonl:{line}")
        for number, line in ((1, 1), (2, 3))
    )
    check_dataset(DATASET, rows, expected=[first])
    with pytest.raises(BrokenPromise, match=r"example 1 is .* was expected"):
        check_dataset(DATASET, rows, expected=[replace(first, origin="rows.jsonl:2")])
    with pytest.raises(BrokenPromise, match="it gives 2 examples, and 3 were expected"):
        check_dataset(DATASET, rows, expected=[first, second, first])


def test_rows_that_a_dataset_makes_itself_are_not_damaged(rows: Path) -> None:
    check_dataset(replace(DATASET, example=careless, rows=own_rows, fields=()), rows)


def test_a_file_that_is_one_array_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": "What?", "answer": "That"}]))
    check_dataset(DATASET, path)


def test_the_built_in_datasets_pass(tmp_path: Path) -> None:
    manager = load_plugins()
    samples = {
        "alpaca": [{"instruction": "Add", "input": "1 and 2", "output": "3"}],
        "jsonl": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    }
    for name, rows in samples.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        check_dataset(find_dataset(manager, name), path)
    (tmp_path / "a.txt").write_text("to be or not to be")
    check_dataset(find_dataset(manager, "text"), tmp_path / "a.txt")
