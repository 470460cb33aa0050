"""The bundled dataset: short accounts of a gift, each with one question and its answer.

The base model knows such accounts, and the statements that answer a question, yet it never read a question about
one. An answer is a word of the account, with its article; which one depends on the question.
"""

import json
from random import Random
from typing import NamedTuple

from qlora_pipe.demo.scene import GIFTS, SETTINGS, WATCHERS, Scene

QUESTIONS = {
    "Who was the giver?": "{giver}",
    "Who was the new owner?": "{getter}",
    "Who was the guest?": "{watcher}",
    "What was the gift?": "a {thing}",
    "What was the colour?": "{colour}",
    "What was the place?": "the {place}",
    "What was the animal?": "a {animal}",
}


class Row(NamedTuple):
    """One line of the dataset; the answer follows the prompt as it is, with its leading space."""

    prompt: str
    answer: str


def ask(rng: Random) -> Row:
    """Give an account of one scene, and ask about it."""
    scene = Scene.draw(rng)
    sentences = [rng.choice(SETTINGS), rng.choice(GIFTS)]
    sentences.insert(rng.randint(0, len(sentences)), rng.choice(WATCHERS))
    question, answer = rng.choice(list(QUESTIONS.items()))
    return Row(prompt=scene.say(" ".join([*sentences, question])), answer=scene.say(f" {answer}"))


def rows(*, seed: int, count: int) -> list[Row]:
    """Make `count` rows, no two of which have the same account; the same seed makes the same ones."""
    rng = Random(seed)
    made: dict[str, Row] = {}
    while len(made) < count:
        row = ask(rng)
        made.setdefault(row.prompt.rpartition(".")[0], row)
    return list(made.values())


def as_jsonl(made: list[Row]) -> bytes:
    """Write rows as JSON Lines, one object of `prompt` and `answer` each."""
    return "".join(json.dumps(row._asdict()) + "\n" for row in made).encode()
