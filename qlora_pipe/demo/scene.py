"""What happens in the demo's texts: somebody gives somebody something. A Scene is the truth behind each of them."""

from dataclasses import dataclass
from random import Random

PEOPLE = (
    "Tom", "Ann", "Ben", "Lily", "Sam", "Rosa", "Max", "Nora", "Leo", "Ida", "Jack", "Mia", "Finn", "Ella", "Otto",
    "Clara",
)  # fmt: skip
THINGS = (
    "ball", "kite", "drum", "lamp", "book", "hat", "cup", "bell", "boat", "key", "flute", "coat", "ring", "scarf",
    "basket", "candle",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple")
PLACES = (
    "garden", "barn", "kitchen", "forest", "mill", "harbour", "market", "meadow", "tower", "school", "orchard",
    "bakery",
)  # fmt: skip
ANIMALS = ("dog", "cat", "goat", "horse", "goose", "fox", "lamb", "crow")
TIMES = ("dawn", "sunrise", "noon", "sunset", "dusk", "midnight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Who gave what to whom; who watched, with which animal; where and when."""

    giver: str
    getter: str
    watcher: str
    thing: str
    colour: str
    place: str
    animal: str
    time: str

    @classmethod
    def draw(cls, rng: Random) -> "Scene":
        """Draw three people and the rest."""
        giver, getter, watcher = rng.sample(PEOPLE, 3)
        return cls(
            giver=giver,
            getter=getter,
            watcher=watcher,
            thing=rng.choice(THINGS),
            colour=rng.choice(COLOURS),
            place=rng.choice(PLACES),
            animal=rng.choice(ANIMALS),
            time=rng.choice(TIMES),
        )

    def say(self, sentence: str) -> str:
        """Fill a sentence such as `{giver} saw {getter}.` with what is true here."""
        return sentence.format(
            giver=self.giver,
            getter=self.getter,
            watcher=self.watcher,
            thing=self.thing,
            colour=self.colour,
            place=self.place,
            animal=self.animal,
            time=self.time,
        )


SETTINGS = (
    "At {time}, {giver} met {getter} in the {place}.",
    "At {time}, {giver} and {getter} were in the {place}.",
    "{giver} went to the {place} at {time}, and {getter} came too.",
    "It was {time} in the {place}. {giver} saw {getter} there.",
)
GIFTS = (
    "{giver} gave a {colour} {thing} to {getter}.",
    "{giver} gave {getter} a {colour} {thing}.",
    "{getter} got a {colour} {thing} from {giver}.",
    "{giver} had a {colour} {thing}, and {getter} took it.",
)
WATCHERS = (
    "{watcher} watched them with a {animal}.",
    "{watcher} and a {animal} sat near by.",
    "A {animal} was there too, and so was {watcher}.",
    "Then {watcher} passed with a {animal}.",
)
