"""Open Assistant's conversations (arXiv 2304.07327): message trees, or the text form that Guanaco was trained on.

A tree gives one conversation: from its prompt downwards always the best reply, which is how the QLoRA paper
(arXiv 2305.14314) chose Guanaco's.
"""

import re
from collections.abc import Sequence

from qlora_pipe.dataset import Dataset, Example, HubFiles, Message, Role
from qlora_pipe.rows import Row, kind_of, table_rows
from qlora_plugins.datasets.nested import nested_row, nested_rows
from qlora_plugins.datasets.turns import turns

# Files differ in what stands before a marker; nobody said it.
MARKER = re.compile(r"[ \n]?(?<!#)### (Human|Assistant):")
_OPEN_ANSWER = re.compile(r"[ \n]?(?<!#)### Assistant: ?\Z")
_READY = "ready_for_export"
_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}


def examples(row: Row) -> list[Example]:
    """Take a tree; or `input`, a conversation, with the reply in `output`; or `text`, a conversation.

    What comes after the last answer is left out: nothing of it would be trained. A tree without an answer, or in
    another state than ready_for_export, gives no example.
    """
    if row.has("message_tree_id"):
        messages = _best_thread(row) if row.text("tree_state") == _READY else []
    elif row.has("output"):
        messages = _replied(row)
    else:
        messages = _told(row)
    said = messages[:-1] if messages and messages[-1].role == "user" else messages
    return [Example(messages=tuple(said), origin=row.origin)] if said else []


def _told(row: Row) -> Sequence[Message]:
    messages = turns(row, "text", row.text("text"), marker=MARKER, human="Human")
    if len(messages) == 1:
        row.refuse("text", 'has no turn of "Assistant"')
    return messages


def _replied(row: Row) -> Sequence[Message]:
    asked = row.text("input")
    opening = _OPEN_ANSWER.search(asked)
    if opening is None:
        row.refuse("input", 'does not end with "### Assistant:"')
    messages = turns(row, "input", asked[: opening.start()], marker=MARKER, human="Human")
    if messages[-1].role == "assistant":
        row.refuse("input", 'has two turns of "Assistant" after each other at its end')
    return [*messages, Message(role="assistant", content=row.text("output"))]


def _best_thread(row: Row) -> Sequence[Message]:
    """Follow the best replies down from the prompt."""
    replies = _kept([nested_row(row, "prompt")])
    thread: list[Message] = []
    while replies:
        best = min(replies, key=_place)
        role = best.text("role")
        if role not in _ROLES:
            best.refuse("role", 'is neither "prompter" nor "assistant"')
        if _ROLES[role] == (thread[-1].role if thread else "assistant"):
            best.refuse("role", f'is "{role}", and this is the other\'s turn')
        thread.append(Message(role=_ROLES[role], content=best.text("text")))
        replies = _kept(nested_rows(best, "replies"))
    return thread


def _kept(messages: list[Row]) -> list[Row]:
    """Leave out what was deleted, and what reviewers turned down: spam."""
    return [
        message
        for message in messages
        if not _is(message, "deleted", True) and not _is(message, "review_result", False)
    ]


def _is(message: Row, name: str, wanted: bool) -> bool:
    value = message.fields.get(name)
    if value is not None and not isinstance(value, bool):
        message.refuse(name, f"is {kind_of(value)}, not true or false")
    return value is wanted


def _place(message: Row) -> tuple[bool, int]:
    """Put the lowest rank first, and messages that nobody ranked last; of equal ones `min` takes the first."""
    rank = message.fields.get("rank")
    if rank is None:
        return True, 0
    if isinstance(rank, bool) or not isinstance(rank, int):
        message.refuse("rank", f"is {kind_of(rank)}, not a whole number")
    return False, rank


DATASET = Dataset(
    name="oasst1",
    help="Open Assistant: a tree's best replies, or Guanaco's text",
    rows=table_rows,
    example=examples,
    hub=HubFiles(
        repo="timdettmers/openassistant-guanaco",
        splits={
            "train": ("openassistant_best_replies_train.jsonl",),
            "eval": ("openassistant_best_replies_eval.jsonl",),
        },
    ),
)
