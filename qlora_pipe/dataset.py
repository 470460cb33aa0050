"""What a dataset plugin says: how a file becomes rows, and a row examples, each a short list of roles and texts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_pipe.errors import DataError
from qlora_pipe.rows import BadRow, Row, json_rows

Role = Literal["system", "user", "assistant", "text"]

SPAN_CORRUPTION = "span-corruption"
"""The form of a text that an encoder-decoder model is to fill gaps in (qlora_pipe/data/spans.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn. Only what an `assistant` says is trained on; a `text` message is trained on as a whole."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sample to train on, before it becomes tokens: a conversation, or a text."""

    messages: tuple[Message, ...]
    origin: str
    """Where it stands, for error messages: `train.jsonl:37`."""
    form: str | None = None
    """The chat template that its rows are written for, such as "alpaca" or "plain" (one after the other, as they are);
    None for a conversation, which is rendered by the checkpoint's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFiles:
    """Where a dataset lies on the Hub."""

    repo: str
    """Such as `tatsu-lab/alpaca`; "" for the one that stands after the colon, hub:USER/NAME."""
    splits: Mapping[str, tuple[str, ...]]
    """Globs over the repository's files, by split; the first split is the one that is meant if none is named."""


ANY_REPOSITORY = HubFiles(repo="", splits={})
"""For a dataset that reads whatever tables a repository of the Hub holds, found by their names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A named source of examples."""

    name: str
    help: str
    """One line for `qlora-pipe plugins`."""
    example: Callable[[Row], Example | Iterable[Example]]
    """Turn one row into an example, or several; DataError, as `row.text` raises it, where the row can't be used."""
    rows: Callable[[Path], Iterator[Row | BadRow]] = json_rows
    """Yield the rows of a file or folder in a fixed order, a BadRow for one that can't be read and be gone on after."""
    hub: HubFiles | None = None
    """Where to fetch it where no path is given."""
    fields: tuple[str, ...] = ()
    """Names of fields that `--map` may give to others, such as `prompt`; () where a row's schema is fixed."""

    def read(self, path: Path) -> Iterator[Example]:
        """Yield the examples of a file; DataError at the first row that can't be used."""
        for row in self.rows(path):
            if isinstance(row, BadRow):
                raise DataError(row.reason)
            found = self.example(row)
            yield from (found,) if isinstance(found, Example) else found


def prompt_and_answer(prompt: str, answer: str, *, origin: str) -> Example:
    """Make the commonest example: a prompt as it is, and the answer that is to follow it."""
    messages = (Message(role="user", content=prompt), Message(role="assistant", content=answer))
    return Example(messages=messages, origin=origin, form="plain")
