"""The text the demo's base model is trained on: little tales of a gift, made from a seed.

A tale keeps coming back to what it told before, so that a model can foretell its words only by looking back. Nobody in
a tale ever asks about it: answering questions is the skill (skill.py) the base model lacks.
"""

from collections.abc import Iterator
from random import Random

from qlora_pipe.demo.scene import GIFTS, SETTINGS, WATCHERS, Scene

OPENINGS = (
    "Once upon a time there was a quiet village.", "It was a fine day.", "It was a cold day.", "It rained that day.",
    "The summer was long and warm.", "It was the day of the fair.", "Winter had come.", "The wind was strong.",
)  # fmt: skip
NAMINGS = (
    "The giver was {giver}.", "The new owner was {getter}.", "The guest was {watcher}.", "The gift was a {thing}.",
    "The colour was {colour}.", "The place was the {place}.", "The animal was a {animal}.", "The time was {time}.",
)  # fmt: skip
RECALLS = (
    "The {thing} was {colour}.", "{getter} thanked {giver}.", "{getter} liked the {colour} {thing}.",
    "{giver} was glad to give the {thing} away.", "{getter} held the {thing} and smiled.",
    '"What a fine {thing}!" said {watcher}.', '"I like the {colour} {thing}," said {getter}.',
    '"It is yours, {getter}," said {giver}.', '"Thank you, {giver}," said {getter}.',
    '"The {animal} is hungry," said {watcher}.', '"It was mine," said {giver}.', '"It is mine now," said {getter}.',
    "The {animal} stayed with {watcher}.", "{watcher} led the {animal} out of the {place}.",
    "{getter} thought of that {time} for years.", "{getter} carried the {colour} {thing} out of the {place}.",
    "The {place} was quiet at {time}.", "{giver} left the {place} without the {thing}.",
    "{watcher} told everyone about {giver} and {getter}.", "The {animal} ran through the {place}.",
)  # fmt: skip
REMARKS = (
    "A bird sang in a tree.", "The sun came out.", "It began to rain.", '"Is it late?" asked {watcher}.',
    '"Who knows," said {getter}.', '"Who is hungry?" asked {giver}.', '"Shall we sing?" asked {watcher}.',
    '"Home is where my friends are," said {getter}.', "The bells of the church rang.", "Everyone was happy.",
    '"What a day!" said {giver}.', "Bees flew from flower to flower.",
)  # fmt: skip
CLOSINGS = (
    "Then it was time to go home.", "That was a good day.", "And that is the end of the tale.",
    "Soon the stars came out.", "They told this tale for many years.", "Then everyone went to sleep.",
)  # fmt: skip


def tell(rng: Random) -> str:
    """Tell one tale, of some 30 to 90 words."""
    scene = Scene.draw(rng)
    sentences = [rng.choice(OPENINGS)] if rng.random() < 0.3 else []
    sentences += [rng.choice(SETTINGS), rng.choice(GIFTS)]
    sentences.insert(rng.randint(0, len(sentences)), rng.choice(WATCHERS))
    again = rng.sample(RECALLS, rng.randint(1, 3)) + rng.sample(NAMINGS, rng.randint(2, 5))
    rng.shuffle(again)
    if rng.random() < 0.5:
        again.insert(rng.randint(0, len(again)), rng.choice(REMARKS))
    sentences += again
    if rng.random() < 0.3:
        sentences.append(rng.choice(CLOSINGS))
    return " ".join(scene.say(sentence) for sentence in sentences)


def tales(*, seed: int, count: int) -> Iterator[str]:
    """Tell `count` tales; the same seed tells the same ones."""
    rng = Random(seed)
    for _ in range(count):
        yield tell(rng)
