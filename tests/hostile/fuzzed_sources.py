"""For each dataset a way to draw good rows, and rows of its own schema whose parts are in the wrong places."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from qlora_pipe.dataset import Dataset
from qlora_plugins.datasets import (
    alpaca,
    chip2,
    flan_v2,
    hh_rlhf,
    jsonl,
    longform,
    oasst1,
    self_instruct,
    unnatural_instructions,
)

Fields = dict[str, Any]
Place = tuple[str | int, ...]
Fault = tuple[Fields, str]

# What text of real rows holds, and what breaks readers that cut lines, unescape or strip.
_WORDS = (
    *(
        "the",
        "sum",
        "of",
        "two",
        "Ω",
        "naïve",
        "日本語",
        "🙂",
        "e\u0301",
        "\\n",
        "\\u0041",
        '"',
        "'",
        "{",
        "}]",
        "</s>",
    ),
    *(
        "\n",
        "\r\n",
        "\t",
        "\u2028",
        "\u2029",
        "\x85",
        "\u00a0",
        "\x00",
        "\x7f",
        "\ufeff",
        "null",
        "NaN",
        "<|endoftext|>",
    ),
)


def words(rng: random.Random) -> str:
    """A text that is not blank, and holds no marker of a turn."""
    middle = [rng.choice(_WORDS) for _ in range(rng.randrange(8))]
    return " ".join(["a", *middle, "z"]) + " " * rng.randrange(2)


class Rows(NamedTuple):
    """Rows of one schema."""

    good: Callable[[random.Random], Fields]
    misplaced: Callable[[random.Random, Fields], Fault]
    """Put something of a good row in the wrong place, or give it to the wrong speaker; and the reason that names it."""


class Source(NamedTuple):
    """A dataset, and rows for it."""

    dataset: Dataset
    rows: Rows
    text: Place
    """A field that must be text and must not be blank."""


def _flat(*names: str) -> Rows:
    """So many texts side by side; misplaced, they lie one level deeper."""

    def good(rng: random.Random) -> Fields:
        return {**{name: words(rng) for name in names}, "id": rng.randrange(100)}

    def misplaced(rng: random.Random, row: Fields) -> Fault:
        return {rng.choice(["row", "data", ""]): row}, rf'field "{names[0]}" is missing \(row has "\w*"\)'

    return Rows(good, misplaced)


def _spoken(name: str, *, human: str, assistant: str, between: str = "", alone: str) -> Rows:
    """One text with markers; misplaced, its turns are out of order. `alone` is said of a question without an answer."""

    def told(rng: random.Random, *speakers: str) -> str:
        return between.join(speaker + words(rng) for speaker in speakers)

    def good(rng: random.Random) -> Fields:
        return {name: told(rng, *[human, assistant] * rng.randrange(1, 4))}

    def misplaced(rng: random.Random, row: Fields) -> Fault:
        nothing = between + assistant.rstrip() + rng.choice(["", " ", "\t"])
        text, reason = rng.choice(
            [
                (told(rng, assistant, human, assistant), "does not begin with a turn of "),
                (words(rng) + row[name], "does not begin with a turn of "),
                (row[name] + between + told(rng, assistant), "has two turns of .* after each other"),
                (told(rng, human) + nothing, "is empty in turn 2, of "),
                (told(rng, human), alone),
            ]
        )
        return {name: text}, f'field "{name}" {reason}'

    return Rows(good, misplaced)


def _tree(rng: random.Random) -> Fields:
    def message(role: str, depth: int) -> Fields:
        other = "assistant" if role == "prompter" else "prompter"
        replies = [message(other, depth - 1) for _ in range(rng.randrange(1, 3))] if depth else []
        rank = rng.choice([None, *range(4)])
        return {"text": words(rng), "role": role, "deleted": False, "rank": rank, "replies": replies}

    return {
        "message_tree_id": "x",
        "tree_state": "ready_for_export",
        "prompt": {**message("prompter", 0), "replies": [message("assistant", rng.randrange(3))]},
    }


def _misplaced_in_tree(rng: random.Random, row: Fields) -> Fault:
    prompt = row["prompt"]
    reply = prompt["replies"][0]
    kind = rng.randrange(7)
    if kind == 0:
        return {**row, "prompt": [prompt]}, 'field "prompt" is an array, not an object'
    if kind == 1:
        prompt["replies"] = reply
        return row, 'prompt: field "replies" is an object, not an array'
    if kind == 2:
        prompt["replies"] = [reply["text"]]
        return row, r'prompt: field "replies\[0\]" is text, not an object'
    if kind == 3:
        reply["role"] = rng.choice(["user", "system", "Assistant", "bot"])
        return row, 'field "role" is neither "prompter" nor "assistant"'
    if kind == 4:
        reply["role"] = "prompter"
        return row, 'field "role" is "prompter", and this is the other\'s turn'
    if kind == 5:
        reply["rank"] = rng.choice(["0", 0.5, True, []])
        return row, r'field "rank" is [a-z ]+, not a whole number'
    reply["deleted"] = rng.choice(["no", 0, []])
    return row, r'field "deleted" is [a-z ]+, not true or false'


def _messages(rng: random.Random) -> Fields:
    turns = [{"role": "user", "content": words(rng)}, {"role": "assistant", "content": words(rng)}]
    return {"messages": [*turns, *({**turn} for turn in turns * rng.randrange(2))]}


def _misplaced_in_messages(rng: random.Random, row: Fields) -> Fault:
    turns = row["messages"]
    kind = rng.randrange(6)
    if kind == 0:
        return {"messages": {str(index): turn for index, turn in enumerate(turns)}}, 'field "messages" is an object'
    if kind == 1:
        return {"messages": [turns]}, r'field "messages\[0\]" is an array, not an object'
    if kind == 2:
        return {"messages": [turns[0]["content"], *turns]}, r'field "messages\[0\]" is text, not an object'
    if kind == 3:
        turns[-1]["role"] = rng.choice(["bot", "Assistant", "tool", "gpt"])
        return row, r'field "messages\[\d\].role" is none of '
    if kind == 4:
        return {
            "messages": turns[:-1]
        }, 'field "messages" ends with the user, and the last word must be the assistant\'s'
    return {**row, "prompt": "a"}, 'field "messages" stands beside "prompt" or "answer"'


def _task(rng: random.Random) -> Fields:
    instances = [{"input": words(rng) * rng.randrange(2), "output": words(rng)} for _ in range(rng.randrange(1, 4))]
    return {"id": "seed", "instruction": words(rng), "instances": instances}


def _unnatural(rng: random.Random) -> Fields:
    def item() -> Fields:
        return {"instruction_with_input": words(rng), "input": "", "constraints": "None.", "output": words(rng)}

    row: Fields = {"instruction": words(rng), "instances": [item() for _ in range(rng.randrange(1, 3))]}
    if rng.random() < 0.7:
        row["reformulations"] = rng.choice([None, [], [item()], [item(), item()]])
    return row


def _misplaced_instances(rng: random.Random, row: Fields) -> Fault:
    instances = row["instances"]
    kind = rng.randrange(4)
    if kind == 0:
        return {**row, "instances": instances[0]}, 'field "instances" is an object, not an array'
    if kind == 1:
        return {**row, "instances": [instances]}, r'field "instances\[0\]" is an array, not an object'
    if kind == 2:
        return {**row, "instances": [*instances, "x"]}, r'field "instances\[\d\]" is text, not an object'
    return {**row, "instances": []}, 'field "instances" is empty'


_UNANSWERED = "ends with the human's turn"
_INSTANCE: Place = ("instances", 0, "output")

SOURCES = {
    "alpaca": Source(alpaca.DATASET, _flat("instruction", "input", "output"), ("output",)),
    "chip2": Source(
        chip2.DATASET,
        _spoken("text", human="<human>: ", assistant="<bot>: ", between="\n", alone=_UNANSWERED),
        ("text",),
    ),
    "flan-v2": Source(flan_v2.DATASET, _flat("inputs", "targets"), ("targets",)),
    "hh-rlhf": Source(
        hh_rlhf.DATASET,
        _spoken("chosen", human="\n\nHuman: ", assistant="\n\nAssistant: ", alone=_UNANSWERED),
        ("chosen",),
    ),
    "jsonl": Source(jsonl.DATASET, Rows(_messages, _misplaced_in_messages), ("messages", 1, "content")),
    "longform": Source(longform.DATASET, _flat("input", "output"), ("output",)),
    "oasst1 text": Source(
        oasst1.DATASET,
        _spoken("text", human="### Human: ", assistant="### Assistant: ", alone='has no turn of "Assistant"'),
        ("text",),
    ),
    "oasst1 trees": Source(oasst1.DATASET, Rows(_tree, _misplaced_in_tree), ("prompt", "text")),
    "self-instruct pairs": Source(self_instruct.DATASET, _flat("prompt", "completion"), ("completion",)),
    "self-instruct tasks": Source(self_instruct.DATASET, Rows(_task, _misplaced_instances), _INSTANCE),
    "unnatural-instructions": Source(unnatural_instructions.DATASET, Rows(_unnatural, _misplaced_instances), _INSTANCE),
}
