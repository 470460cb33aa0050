"""What a dataset plugin yields: examples, each a short list of roles and texts with the place they came from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant", "text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn. Only what an `assistant` says is trained on; a `text` message is trained on as a whole."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sample to train on, before it becomes tokens.

    `template` says how the messages become one string: "plain" sets them one after the other as they are (a prompt
    and its answer, or a text); "chat" gives each turn its marker.
    """

    messages: tuple[Message, ...]
    origin: str
    """Where it stands, for error messages: `train.jsonl:37`."""
    template: Literal["plain", "chat"] = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A named source of examples."""

    name: str
    help: str
    """One line for `qlora-pipe plugins`."""
    read: Callable[[Path], Iterator[Example]]
    """Yield the examples of a file in a fixed order; DataError names file, line and field of a malformed row."""


def prompt_and_answer(prompt: str, answer: str, *, origin: str) -> Example:
    """Make the commonest example: a prompt as it is, and the answer that is to follow it."""
    return Example(
        messages=(Message(role="user", content=prompt), Message(role="assistant", content=answer)), origin=origin
    )
