"""From examples to samples: render, tokenise once, mask by character offsets, cut.

A conversation is cut after each answer. Every such piece (what leads to the answer, and the answer) is rendered to one
string and tokenised in one go, as it would be when the model is used, so that no token stands there which generation
would never produce; an EOS id follows it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qlora_pipe.data.spans import corrupted, sentinels_of
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import SPAN_CORRUPTION, Example
from qlora_pipe.errors import DataError

# Changes whenever the same rows would become other samples.
ENCODING_VERSION = 1

# What stands before and after each turn's text.
CHAT_FORM = {"system": ("", "\n"), "user": ("### Human: ", "\n"), "assistant": ("### Assistant: ", "")}
PLAIN_FORM = {"system": ("", ""), "user": ("", ""), "assistant": ("", "")}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of a conversation that ends with an answer, as one string."""

    text: str
    answer_start: int
    """The character of `text` that the answer begins at."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """Makes samples of examples, as one tokenizer and one length have it."""

    tokenizer: Tokenizer
    max_tokens: int
    start_id: int | None = None
    """The id that a seq2seq model's decoder begins with; None for a causal model."""

    @property
    def fingerprint(self) -> str:
        """All that samples follow from besides the rows, in hexadecimal."""
        ids = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        parts = (ENCODING_VERSION, self.tokenizer.digest, *ids, self.max_tokens, self.start_id)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def encode(self, examples: Sequence[Example]) -> Iterator[list[Sample] | DataError]:
        """Give for each example, in order, its samples or what is wrong with it."""
        for example in examples:
            try:
                yield list(encode(example, self.tokenizer, max_tokens=self.max_tokens, start_id=self.start_id))
            except DataError as fault:
                yield fault


def encode(example: Example, tokenizer: Tokenizer, *, max_tokens: int, start_id: int | None = None) -> Iterator[Sample]:
    """Yield an example's samples: one for a prompt or a conversation, windows for a text.

    With `start_id`, which a decoder begins with, it is the sample of a seq2seq model: the last answer, and as its
    source all that leads to it. DataError names the row whose text the tokenizer cannot take, or of which nothing would
    be trained.
    """
    kinds = {message.role == "text" for message in example.messages}
    if kinds == {True} and example.form == SPAN_CORRUPTION:
        return _corrupted(example, tokenizer, max_tokens=max_tokens, start_id=start_id)
    if start_id is not None:
        if kinds != {False}:
            raise DataError(f"{example.origin}: a text has no answer, which is what an encoder-decoder model learns")
        return iter([_both_sides(example, tokenizer, max_tokens=max_tokens, start_id=start_id)])
    if kinds == {True}:
        return _windows(example, tokenizer, max_tokens=max_tokens)
    if kinds != {False}:
        raise DataError(f"{example.origin}: an example has text alone, or the turns of a conversation")
    return iter([_conversation(example, tokenizer, max_tokens=max_tokens)])


def pieces(example: Example) -> list[Piece]:
    """Render a conversation, one piece per answer; DataError where the last turn is not an answer."""
    form = CHAT_FORM if example.form is None else PLAIN_FORM
    found: list[Piece] = []
    lead = ""
    for message in example.messages:
        before, after = form[message.role]
        lead += before
        if message.role == "assistant":
            found.append(Piece(text=lead + message.content + after, answer_start=len(lead)))
            lead = ""
        else:
            lead += message.content + after
    if lead or not found:
        raise DataError(f"{example.origin}: the last turn is not the assistant's, so there is no answer to train on")
    return found


def _conversation(example: Example, tokenizer: Tokenizer, *, max_tokens: int) -> Sample:
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    trained = [False] * len(ids)
    for piece in pieces(example):
        piece_ids, offsets = _tokenise(piece.text, tokenizer, origin=example.origin)
        # A token over the border holds the answer's first letters, and generation has to produce it after the
        # prompt's last whole token; so it is trained. A token without width belongs to what stands before it.
        in_answer = [end > piece.answer_start for _, end in offsets]
        if not any(in_answer):
            raise DataError(f"{example.origin}: the tokenizer makes no token of the answer")
        ids += [*piece_ids, tokenizer.eos_id]
        trained += [*in_answer, True]
    trained[0] = False
    if not any(trained[:max_tokens]):
        raise DataError(
            f"{example.origin}: nothing is left to train: the sample has {len(ids)} tokens, its answer begins at token"
            f" {trained.index(True) + 1} and --max-tokens is {max_tokens}; raise --max-tokens or remove the row"
        )
    return _sample(ids[:max_tokens], trained[:max_tokens], origin=example.origin, cut=len(ids) > max_tokens)


def _both_sides(example: Example, tokenizer: Tokenizer, *, max_tokens: int, start_id: int) -> Sample:
    *earlier, last = pieces(example)
    prompt = "".join(piece.text for piece in earlier) + last.text[: last.answer_start]
    source, _ = _tokenise(prompt, tokenizer, origin=example.origin)
    answer, _ = _tokenise(last.text[last.answer_start :], tokenizer, origin=example.origin)
    if not answer:
        raise DataError(f"{example.origin}: the tokenizer makes no token of the answer")
    ids = [start_id, *answer, tokenizer.eos_id]
    sample = _sample(
        ids[:max_tokens],
        [False, *[True] * (len(ids) - 1)][:max_tokens],
        origin=example.origin,
        cut=max(len(ids), len(source) + 1) > max_tokens,
    )
    return replace(sample, source=np.array([*source[: max_tokens - 1], tokenizer.eos_id], dtype=np.int32))


def _windows(example: Example, tokenizer: Tokenizer, *, max_tokens: int) -> Iterator[Sample]:
    """Cut a document into windows in which every token of it is a target exactly once.

    A window begins with BOS; without one in the tokenizer, with the token before it, so that no target lacks a
    context. (Then the document's first token, which nothing stands before, is the one that is no target.)
    """
    text = "".join(message.content for message in example.messages)
    ids, _ = _tokenise(text, tokenizer, origin=example.origin)
    if not ids:
        raise DataError(f"{example.origin}: the tokenizer makes no token of the text")
    bos_id = tokenizer.bos_id
    stream = [*([] if bos_id is None else [bos_id]), *ids, tokenizer.eos_id]
    for number, start in enumerate(range(1, len(stream), max_tokens - 1), start=1):
        body = stream[start : start + max_tokens - 1]
        if bos_id is not None and body == [tokenizer.eos_id]:
            # BOS and EOS alone would teach that a text may end before it begins.
            return
        head = stream[start - 1] if bos_id is None else bos_id
        yield _sample(
            [head, *body], [False] + [True] * len(body), origin=f"{example.origin} window {number}", cut=False
        )


def _corrupted(example: Example, tokenizer: Tokenizer, *, max_tokens: int, start_id: int | None) -> Iterator[Sample]:
    """Cut a document into windows, and drop spans of each: a source, and what a decoder learns to say of it."""
    if start_id is None:
        raise DataError(
            f"{example.origin}: span corruption is for encoder-decoder models, and this one is causal; take the dataset"
            " text"
        )
    text = "".join(message.content for message in example.messages)
    ids, _ = _tokenise(text, tokenizer, origin=example.origin)
    windows = corrupted(ids, sentinels=sentinels_of(tokenizer), eos_id=tokenizer.eos_id, max_tokens=max_tokens)
    try:
        for number, (source, target) in enumerate(windows, start=1):
            sample = _sample(
                [start_id, *target],
                [False] + [True] * len(target),
                origin=f"{example.origin} window {number}",
                cut=False,
            )
            yield replace(sample, source=np.array(source, dtype=np.int32))
    except DataError as fault:
        raise DataError(f"{example.origin}: {fault}") from fault


def _tokenise(text: str, tokenizer: Tokenizer, *, origin: str) -> tuple[list[int], list[tuple[int, int]]]:
    try:
        return tokenizer.encode(text)
    except DataError as fault:
        raise DataError(f"{origin}: {fault}") from fault


def _sample(ids: Sequence[int], trained: Sequence[bool], *, origin: str, cut: bool) -> Sample:
    return Sample(ids=np.array(ids, dtype=np.int32), trained=np.array(trained, dtype=np.bool_), origin=origin, cut=cut)
