"""Whether a dataset keeps what qlora_pipe builds on: for the tests of whoever writes one."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from qlora_formats.commit import write_file
from qlora_pipe.data.encode import Encoder
from qlora_pipe.data.templates import Templates
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import SPAN_CORRUPTION, Dataset, Example, Message, Role
from qlora_pipe.errors import DataError
from qlora_pipe.plugin_items import fault_of_item, listed
from qlora_pipe.plugins import load_plugins
from qlora_pipe.rows import BadRow, Row, json_lines, json_rows
from qlora_pipe.testing.checkpoints import write_json, write_tokenizer
from qlora_pipe.testing.subject import BrokenPromise

_ROWS_DAMAGED = 20
_MOST_TOKENS = 1 << 20
# What may stand in a field of a damaged row.
_NONSENSE: tuple[Any, ...] = (None, True, 7, "", "\ud800", [], [None], {}, {"role": 1}, [{"role": "x", "content": 3}])


class _ReadFields(dict[str, Any]):
    """The fields of a row, which remember the names that were asked for."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.read: set[object] = set()

    def __contains__(self, name: object) -> bool:
        self.read.add(name)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of any mapping."""
        self.read.add(name)
        return super().get(name, default)


def check_dataset(dataset: Dataset, path: Path, *, expected: Sequence[Example] | None = None) -> None:
    """Check all that qlora_pipe expects of a dataset, on a file or folder of its own rows at `path`.

    `expected` are the examples that it must begin with. Every row of `path` may be bad, but one must be good. Raises
    BrokenPromise, an AssertionError, at the first promise that is broken; its sentence says which, and what to look at.
    """
    promise = _Promise(dataset)
    fault = fault_of_item(dataset, Dataset)
    promise.require(fault is None, f"the plugin {fault}.")
    rows = promise.rows(path)
    promise.require(rows == promise.rows(path), "two readings of one file give other rows: their order must be fixed.")
    good = [row for row in rows if isinstance(row, Row)]
    examples = [example for row in good for example in promise.examples(row) or []]
    again = [example for row in good for example in promise.examples(row) or []]
    promise.require(bool(examples), f"{path.name} gives no example: name a file with rows that it reads.")
    promise.require(
        examples == again, "one row gives other examples the second time: they may follow from the row alone."
    )
    if expected is not None:
        for number, (found, wanted) in enumerate(zip(examples, expected, strict=False), start=1):
            promise.require(found == wanted, f"example {number} is {found}, and {wanted} was expected.")
        promise.require(
            len(examples) >= len(expected), f"it gives {len(examples)} examples, and {len(expected)} were expected."
        )
    _check_damaged(promise, good)
    _check_fields(promise, good)
    with tempfile.TemporaryDirectory() as folder:
        _check_goes_on(promise, path, rows, Path(folder))
        _check_encodes(promise, examples, Path(folder))


class _Promise:
    """A dataset, called as qlora_pipe calls it, and the sentence that says what is wrong with it."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def require(self, kept: bool, sentence: str) -> None:
        """Raise BrokenPromise with a sentence unless a promise is kept."""
        if not kept:
            raise BrokenPromise(f"{self.dataset.name}: {sentence}")

    def rows(self, path: Path) -> list[Row | BadRow]:
        """Read all rows; each says where it stands."""

        def read() -> list[Row | BadRow]:
            return list(self.dataset.rows(path))

        found = self._only_data_errors(read, "rows")
        self.require(found is not None, f"rows refuses {path.name} as a whole: name a file that it reads.")
        assert found is not None
        for row in found:
            self.require(
                isinstance(row, Row | BadRow), f"rows yields a {type(row).__name__}; it must be a Row or a BadRow."
            )
            self._require_place(row, path)
        return found

    def _require_place(self, row: Row | BadRow, path: Path) -> None:
        said = row.origin if isinstance(row, Row) else row.reason
        files = {path.name} if path.is_file() else {file.name for file in path.rglob("*")}
        place = next((said[len(name) + 1 :] for name in files if said.startswith(f"{name}:")), "")
        # A row that is a whole file stands at no line of it.
        is_whole_file = isinstance(row, Row) and said in files
        self.require(
            is_whole_file or place.partition(":")[0].isdigit(),
            f"a row says that it stands at {said!r}: it must begin with FILE:LINE.",
        )

    def examples(self, row: Row) -> list[Example] | None:
        """Turn a row into examples, which are checked; None where the row is refused."""

        def read() -> list[Example]:
            found = self.dataset.example(row)
            return [found] if isinstance(found, Example) else list(found)

        found = self._only_data_errors(read, "example", row)
        for example in found or []:
            self._check(example, row)
        return found

    def _only_data_errors(self, work: Callable[[], list[Any]], what: str, row: Row | None = None) -> list[Any] | None:
        """Run a part of the dataset: what it gives, or None where it raised a DataError that names the place."""
        try:
            return work()
        except DataError as fault:
            if row is not None:
                self.require(
                    str(fault).startswith(f"{row.origin}: "),
                    f"it refuses {row.origin} with {str(fault)!r}: begin with the row's origin, as row.refuse does.",
                )
            return None
        except Exception as fault:
            at = "" if row is None else f" on {row.origin} with the fields {row.fields!r}"
            raise BrokenPromise(
                f"{self.dataset.name}: {what} raises {type(fault).__name__} ({fault}){at}; a row that can't be used is"
                " a DataError: read fields with row.text, refuse them with row.refuse."
            ) from fault

    def _check(self, example: Example, row: Row) -> None:
        self.require(
            isinstance(example, Example), f"example gives a {type(example).__name__}; it must be an Example or several."
        )
        where = f"the example of {row.origin}"
        self.require(
            example.origin.startswith(row.origin),
            f"{where} says that it stands at {example.origin!r}: pass on row.origin.",
        )
        messages = example.messages
        self.require(
            isinstance(messages, tuple) and all(isinstance(message, Message) for message in messages),
            f"{where} has messages that are no tuple of Message.",
        )
        roles = [message.role for message in messages]
        for role in roles:
            self.require(role in get_args(Role), f"{where} has the role {role!r}; roles are {listed(get_args(Role))}.")
        self.require(
            all(isinstance(message.content, str) for message in messages), f"{where} has content that is not text."
        )
        self.require(
            roles[-1:] == ["assistant"] or (roles != [] and {*roles} == {"text"}),
            f"{where} ends with {listed(roles[-1:])}: what is trained on is the assistant's, or a text alone.",
        )
        self.require(
            example.form is None or isinstance(example.form, str), f"{where} has the form {example.form!r}, no name."
        )


def _check_damaged(promise: _Promise, good: Sequence[Row]) -> None:
    """Rows that lack a field, or hold nonsense in one, are used or refused, and break nothing.

    A dataset that reads its files itself knows what it puts into its rows.
    """
    if not promise.dataset.rows.__module__.startswith("qlora_pipe.rows"):
        return
    for row in good[:_ROWS_DAMAGED]:
        for name in row.fields:
            promise.examples(replace(row, fields={key: each for key, each in row.fields.items() if key != name}))
            for value in _NONSENSE:
                promise.examples(replace(row, fields={**row.fields, name: value}))


def _check_fields(promise: _Promise, good: Sequence[Row]) -> None:
    """What `--map` may rename are fields that are read."""
    names = promise.dataset.fields
    promise.require(len({*names}) == len(names), f"its fields are {listed(names)}: one of them stands twice.")
    read: set[object] = set()
    for row in good:
        fields = _ReadFields(row.fields)
        promise.examples(replace(row, fields=fields))
        read |= fields.read
    for name in names:
        promise.require(
            bool(name) and not set(name) & set("=, "), f"its field {name!r} can't be written on a command line."
        )
        promise.require(
            name in read,
            f"its fields name {name!r}, which no row here is asked for: --map {name}=... would do nothing.",
        )


def _check_goes_on(promise: _Promise, path: Path, rows: Sequence[Row | BadRow], folder: Path) -> None:
    """A line that is no JSON is one bad row, and all others are read; only of files with a row on each line."""
    if promise.dataset.rows not in (json_lines, json_rows) or not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    if lines[0].lstrip().startswith(b"["):
        return
    damaged = folder / path.name
    write_file(damaged, b"".join([*lines[:1], b"\n" * (not lines[0].endswith(b"\n")), b"{ broken\n", *lines[1:]]))
    found = promise.rows(damaged)
    promise.require(
        len(found) == len(rows) + 1, f"after a row that can't be read it gives {len(found)} rows of {len(rows) + 1}."
    )


def _check_encodes(promise: _Promise, examples: Sequence[Example], folder: Path) -> None:
    """Every example becomes samples with something to train on."""
    write_tokenizer(folder)
    write_json(folder / "config.json", {})
    tokenizer = Tokenizer.open(folder)
    templates = Templates.open(folder, tokenizer, choice="auto", manager=load_plugins())
    encoder = Encoder(tokenizer=tokenizer, max_tokens=_MOST_TOKENS, templates=templates)
    # Spans are dropped for encoder-decoder models alone, and then the text is that of any.
    texts = [replace(each, form=None) if each.form == SPAN_CORRUPTION else each for each in examples]
    for example, found in zip(examples, encoder.encode(texts), strict=True):
        if isinstance(found, DataError):
            raise BrokenPromise(f"{promise.dataset.name}: an example can't be trained on: {found}.") from found
        promise.require(
            any(sample.trained.any() for sample in found),
            f"the example of {example.origin} leaves nothing to train on.",
        )
