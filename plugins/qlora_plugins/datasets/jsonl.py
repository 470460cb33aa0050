"""JSON Lines: a row has a `prompt` and an `answer`, or `messages` with a role and a content each."""

from qlora_pipe.dataset import Dataset, Example, Message, Role, prompt_and_answer
from qlora_pipe.rows import Row, json_lines, kind_of

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def example(row: Row) -> Example:
    """Take either form; the two may stand in one file."""
    return _conversation(row) if row.has("messages") else _pair(row)


def _pair(row: Row) -> Example:
    prompt = row.text("prompt", may_be_empty=True)
    return prompt_and_answer(prompt, row.text("answer"), origin=row.origin)


def _conversation(row: Row) -> Example:
    if row.has("prompt") or row.has("answer"):
        row.refuse("messages", 'stands beside "prompt" or "answer"; a row has one form')
    turns = row.fields["messages"]
    if not isinstance(turns, list):
        row.refuse("messages", f"is {kind_of(turns)}, not an array")
    if not turns:
        row.refuse("messages", "is empty")
    messages = tuple(_message(row, turn, name=f"messages[{index}]") for index, turn in enumerate(turns))
    if messages[-1].role != "assistant":
        row.refuse("messages", f"ends with the {messages[-1].role}, and the last word must be the assistant's")
    return Example(messages=messages, origin=row.origin)


def _message(row: Row, turn: object, *, name: str) -> Message:
    if not isinstance(turn, dict):
        row.refuse(name, f"is {kind_of(turn)}, not an object")
    for key in ("role", "content"):
        if key not in turn:
            row.refuse(f"{name}.{key}", "is missing")
    role = row.checked_text(f"{name}.role", turn["role"])
    if role not in ROLES:
        row.refuse(f"{name}.role", 'is none of "system", "user", "assistant"')
    content = row.checked_text(f"{name}.content", turn["content"], may_be_empty=role != "assistant")
    return Message(role=ROLES[role], content=content)


DATASET = Dataset(
    name="jsonl",
    help="JSON Lines with prompt and answer, or with messages of system, user and assistant",
    rows=json_lines,
    example=example,
    fields=("prompt", "answer", "messages"),
)
