"""From examples to samples: render, tokenise once, mask by character offsets, cut.

A conversation is rendered by a chat template to one string and tokenised in one go, as it is when the model is used.
Which characters are trained follows from the rendering (data/render.py) and never from a search for markers; a token is
trained that covers any of them, for generation would have to produce it after the last whole token before.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora_pipe.data.control import ControlTokens, Tokens
from qlora_pipe.data.draft import Stretch, draft
from qlora_pipe.data.render import FROZEN_NOW, Rendered, TrainOn, Turn
from qlora_pipe.data.spans import corrupted, sentinels_of
from qlora_pipe.data.templates import Template, Templates
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import SPAN_CORRUPTION, Example
from qlora_pipe.errors import DataError
from qlora_pipe.rows import LONE_SURROGATE

# Changes whenever the same rows would become other samples.
ENCODING_VERSION = 2

Kind = Literal["causal", "seq2seq"]
PLAIN_FORM = "plain"
"""The form of rows that are a prompt and an answer, one after the other as they are."""

# Marks and signs are private-use characters of these (data/render.py, data/control.py).
_RESERVED = re.compile("[\U0010e000-\U0010fffd]")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One sequence to train on: ids [T], int32, and which of them are targets, [T], bool.

    The first id is never a target, for nothing stands before it.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    origin: str
    source: NDArray[np.int32] | None = None
    """What the encoder of a seq2seq model reads [S], int32; `ids` are then what its decoder does, and begin with the id
    that starts it."""
    cut: bool = False
    """Whether tokens beyond the longest sample allowed were left out."""


class _Part(NamedTuple):
    """What becomes one sample."""

    source: str | None
    """Of a seq2seq model, signed."""
    text: str
    answers: list[Stretch]
    """Which stretches of `text` are trained; empty for all of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """Makes samples of examples: all that they follow from besides the rows."""

    tokenizer: Tokenizer
    max_tokens: int
    """Longest sample, and of a seq2seq model the longest source and the longest target."""
    templates: Templates
    train_on: TrainOn = "answers"
    kind: Kind = "causal"
    start_id: int | None = None
    """The id that the decoder of a seq2seq model begins with."""
    _control: ControlTokens = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert (self.kind == "seq2seq") == (self.start_id is not None), "a seq2seq decoder begins with an id"
        object.__setattr__(self, "_control", ControlTokens.of(self.tokenizer))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides what samples a row becomes, hexadecimal."""
        tokenizer = self.tokenizer
        facts = (
            ENCODING_VERSION, tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id, tokenizer.behind,
            sorted(tokenizer.names.items()), sorted(tokenizer.control), self.max_tokens, self.train_on, self.kind,
            self.start_id, self.templates.sources, FROZEN_NOW.isoformat(),
        )  # fmt: skip
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def shared_template(self, example: Example) -> str | None:
        """The template as other programs have to read it, which put no BOS before what it writes.

        None where rows like this example are rendered with none that would serve another conversation.
        """
        template = self._template_of(example)
        if template is None or (example.form == PLAIN_FORM and self.templates.chosen is None):
            return None
        if not template.installed or self.tokenizer.bos_id is None:
            return template.source
        bos = json.dumps(self.tokenizer.inner.id_to_token(self.tokenizer.bos_id), ensure_ascii=False)
        return f"{{{{- {bos} }}}}{template.source}"

    def encode(self, examples: Sequence[Example]) -> Iterator[list[Sample] | DataError]:
        """Yield each example's samples, in order: one for a conversation, windows for a text.

        A DataError in their place names the row and says why it can't be used. DataError is raised where no row can be:
        a template is none, or takes more than it may.
        """
        found: dict[int, list[Sample] | DataError] = {}
        groups: dict[Template | None, list[int]] = {}
        for number, example in enumerate(examples):
            try:
                groups.setdefault(self._template_of(example), []).append(number)
            except DataError as fault:
                found[number] = _named(example, fault)
        for template, numbers in groups.items():
            grouped = [examples[number] for number in numbers]
            made = self._texts(grouped) if template is None else self._conversations(grouped, template)
            found.update(zip(numbers, made, strict=True))
        for number in range(len(examples)):
            yield found.pop(number)

    def _template_of(self, example: Example) -> Template | None:
        """The template that renders a conversation, None for a text; DataError where the row is neither, or no text."""
        for message in example.messages:
            if fault := LONE_SURROGATE.search(message.content):
                raise DataError(f"the text holds a lone surrogate at character {fault.start()}")
            if fault := _RESERVED.search(message.content):
                raise DataError(
                    f"the text holds the private-use character U+{ord(fault[0]):X} at character {fault.start()}, which"
                    " stands for control tokens here; remove it from the text"
                )
        kinds = {message.role == "text" for message in example.messages}
        if kinds == {True, False}:
            raise DataError("an example has text alone, or the turns of a conversation")
        if kinds == {True}:
            if self.kind == "seq2seq" and example.form != SPAN_CORRUPTION:
                raise DataError(
                    "an encoder-decoder model is trained on prompts and answers, and this is a text alone; the dataset"
                    " span-corruption makes both of it"
                )
            if self.kind == "causal" and example.form == SPAN_CORRUPTION:
                raise DataError("span corruption is for encoder-decoder models; for a causal one take the dataset text")
            return None
        if not kinds or example.messages[-1].role != "assistant":
            raise DataError("the last turn is not the assistant's, so there is no answer to train on")
        return self.templates.find(example.form)

    def _conversations(self, examples: Sequence[Example], template: Template) -> Iterator[list[Sample] | DataError]:
        turns = [[Turn(message.role, message.content) for message in example.messages] for example in examples]
        # The source is never trained, so of an encoder-decoder model all that can be is the answers.
        train_on: TrainOn = "answers" if self.kind == "seq2seq" and self.train_on == "all" else self.train_on
        rendered = self.templates.render(template, turns, train_on=train_on)
        drafted: list[list[_Part] | DataError] = []
        for example, spoken, item in zip(examples, turns, rendered, strict=True):
            try:
                drafted.append(self._parts(spoken, item))
            except DataError as fault:
                drafted.append(_named(example, fault))
        parts = [part for each in drafted if not isinstance(each, DataError) for part in each]
        tokens = iter(self._tokens([text for part in parts for text in (part.source, part.text) if text is not None]))
        for example, each in zip(examples, drafted, strict=True):
            if isinstance(each, DataError):
                yield each
                continue
            mine = [[next(tokens) for text in (part.source, part.text) if text is not None] for part in each]
            try:
                yield [
                    self._sample(part, of_part, origin=_numbered(example, number, of=len(each)), template=template)
                    for number, (part, of_part) in enumerate(zip(each, mine, strict=True), start=1)
                ]
            except DataError as fault:
                yield _named(example, fault)

    def _parts(self, turns: Sequence[Turn], rendered: Rendered | str) -> list[_Part]:
        if isinstance(rendered, str):
            raise DataError(rendered)
        text, answers = draft(rendered, turns, self._control)
        if self.kind == "causal":
            return [_Part(None, text, answers)]
        return [_Part(text[: answer.start], text[answer.start : answer.said], []) for answer in answers]

    def _tokens(self, texts: Sequence[str]) -> list[Tokens | DataError]:
        try:
            return [*self._control.encode(texts)]
        except DataError as fault:
            # Which of them it was, the tokenizers library does not say.
            return [fault] if len(texts) == 1 else [each for text in texts for each in self._tokens([text])]

    def _sample(self, part: _Part, tokens: Sequence[Tokens | DataError], *, origin: str, template: Template) -> Sample:
        sound = [each for each in tokens if not isinstance(each, DataError)]
        if len(sound) < len(tokens):
            raise next(each for each in tokens if isinstance(each, DataError))
        # What a stranger's template writes is whole; before what others write the tokenizer puts its BOS.
        front = [self.tokenizer.bos_id] if template.installed and self.tokenizer.bos_id is not None else []
        if part.source is not None:
            return self._pair(front, *sound, origin=origin)
        return self._sequence(front, *sound, answers=part.answers, origin=origin)

    def _sequence(self, front: list[int], text: Tokens, *, answers: Sequence[Stretch], origin: str) -> Sample:
        """What a causal model reads, with its answers trained, or all of it where there are none."""
        if front == text.ids[:1].tolist():
            front = []
        trained = np.full(len(text.ids), not answers)
        for answer in answers:
            # A token over the border holds the answer's first letters, and is trained. A token without width belongs
            # to what stands before it.
            if not ((text.ends > answer.start) & (text.starts < answer.said)).any():
                raise DataError("the tokenizer makes no token of the answer")
            trained |= (text.ends > answer.start) & (text.starts < answer.end)
        ids = np.concatenate([np.array(front, dtype=np.int32), text.ids])
        trained = np.concatenate([np.zeros(len(front), dtype=np.bool_), trained])
        trained[:1] = False
        if not trained[: self.max_tokens].any():
            raise DataError(self._nothing_left(len(ids), first=int(trained.argmax())))
        return Sample(
            ids=ids[: self.max_tokens],
            trained=trained[: self.max_tokens],
            origin=origin,
            cut=len(ids) > self.max_tokens,
        )

    def _pair(self, front: list[int], source: Tokens, answer: Tokens, *, origin: str) -> Sample:
        """A source, with what the tokenizer puts around a text, and the target that a decoder learns to write."""
        if not len(answer.ids):
            raise DataError("the tokenizer makes no token of the answer")
        behind = self.tokenizer.behind
        room = max(self.max_tokens - len(front) - len(behind), 0)
        target = np.array([self.start_id, *answer.ids, self.tokenizer.eos_id], dtype=np.int32)
        trained = np.ones(len(target), dtype=np.bool_)
        trained[0] = False
        return Sample(
            ids=target[: self.max_tokens],
            trained=trained[: self.max_tokens],
            origin=origin,
            source=np.array([*front, *source.ids[:room], *behind], dtype=np.int32),
            cut=len(source.ids) > room or len(target) > self.max_tokens,
        )

    def _nothing_left(self, length: int, *, first: int) -> str:
        return (
            f"nothing is left to train: the sample has {length} tokens, its answer begins at token {first + 1} and"
            f" --max-tokens is {self.max_tokens}; raise --max-tokens or remove the row"
        )

    def _texts(self, examples: Sequence[Example]) -> Iterator[list[Sample] | DataError]:
        # One at a time: such a text is long, and there are few.
        for example in examples:
            try:
                yield list(self._corrupted(example) if example.form == SPAN_CORRUPTION else self._windows(example))
            except DataError as fault:
                yield _named(example, fault)

    def _windows(self, example: Example) -> Iterator[Sample]:
        """Cut a document into windows in which every token of it is a target exactly once.

        A window begins with BOS; without one in the tokenizer, with the token before it, so that no target lacks a
        context. (Then the document's first token, which nothing stands before, is the one that is no target.)
        """
        tokens = self._of_text(example)
        bos_id, eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        stream = np.array([*([] if bos_id is None else [bos_id]), *tokens.ids, eos_id], dtype=np.int32)
        for number, start in enumerate(range(1, len(stream), self.max_tokens - 1), start=1):
            body = stream[start : start + self.max_tokens - 1]
            if bos_id is not None and body.tolist() == [eos_id]:
                # BOS and EOS alone would teach that a text may end before it begins.
                return
            ids = np.concatenate([stream[start - 1 : start] if bos_id is None else stream[:1], body])
            trained = np.ones(len(ids), dtype=np.bool_)
            trained[0] = False
            yield Sample(ids=ids, trained=trained, origin=f"{example.origin} window {number}")

    def _corrupted(self, example: Example) -> Iterator[Sample]:
        """Cut a document into windows, and drop spans of each: a source, and what a decoder learns to say of it."""
        windows = corrupted(
            self._of_text(example).ids.tolist(),
            sentinels=sentinels_of(self.tokenizer),
            eos_id=self.tokenizer.eos_id,
            max_tokens=self.max_tokens,
        )
        for number, (source, target) in enumerate(windows, start=1):
            ids = np.array([self.start_id, *target], dtype=np.int32)
            trained = np.ones(len(ids), dtype=np.bool_)
            trained[0] = False
            yield Sample(
                ids=ids,
                trained=trained,
                source=np.array(source, dtype=np.int32),
                origin=f"{example.origin} window {number}",
            )

    def _of_text(self, example: Example) -> Tokens:
        (tokens,) = self._control.encode(["".join(message.content for message in example.messages)])
        if not len(tokens.ids):
            raise DataError("the tokenizer makes no token of the text")
        return tokens


def _named(example: Example, fault: DataError) -> DataError:
    return DataError(f"{example.origin}: {fault}")


def _numbered(example: Example, number: int, *, of: int) -> str:
    return example.origin if of == 1 else f"{example.origin} answer {number}"
