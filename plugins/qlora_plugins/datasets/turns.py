"""Conversations written as one text, in which a marker begins each turn: several datasets are."""

import re

from qlora_pipe.dataset import Message
from qlora_pipe.rows import Row


def turns(row: Row, name: str, text: str, *, marker: re.Pattern[str], human: str) -> tuple[Message, ...]:
    """Cut `text` at its markers into turns, the human's first, and then by turns.

    The first group of `marker` says who speaks: `human`, or else the assistant. The space that follows a marker is no
    part of the turn; all that comes after it up to the next marker is. A text that is not written so is a DataError,
    which calls it by `name`: what it might have been is not guessed.
    """
    found = list(marker.finditer(text))
    if not found or found[0].start() != 0 or found[0][1] != human:
        row.refuse(name, f'does not begin with a turn of "{human}"')
    ends = [mark.start() for mark in found[1:]] + [len(text)]
    messages: list[Message] = []
    speaker = ""
    for number, (mark, end) in enumerate(zip(found, ends, strict=True), start=1):
        if mark[1] == speaker:
            row.refuse(name, f'has two turns of "{speaker}" after each other, {number - 1} and {number}')
        speaker = mark[1]
        said = text[mark.end() : end]
        if not said.strip():
            row.refuse(name, f'is empty in turn {number}, of "{speaker}"')
        if not said.startswith(" "):
            row.refuse(name, f'has no space after the marker of turn {number}, of "{speaker}"')
        messages.append(Message(role="user" if speaker == human else "assistant", content=said[1:]))
    return tuple(messages)


def answered(row: Row, name: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Give the turns back if the last is the assistant's; DataError otherwise."""
    if messages[-1].role != "assistant":
        row.refuse(name, "ends with the human's turn, and the last word must be the assistant's")
    return messages
