"""T5's objective for plain text: drop spans of it, and have the model say what was dropped (arXiv 1910.10683, 3.1.4).

A window of a text becomes a source in which a sentinel stands for each span that was dropped, and a target that names
each sentinel and says what it stands for, and a last sentinel that ends it:

    window   thank you for inviting me to your party last week
    source   thank you <0> me to your party <1> week EOS
    target   <0> for inviting <1> last <2> EOS

15 % of a window's tokens are dropped, in spans of 3 on average. Of all ways to choose so many spans of together so many
tokens that no two of them touch, each is as likely as any other.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import ConfigError, DataError

DROPPED_SHARE = 0.15
MEAN_SPAN = 3.0

# The second way is that of mT5, whose sentinels are pieces of its vocabulary.
_NAMES = ("<extra_id_{}>", "▁<extra_id_{}>")


class Corrupted(NamedTuple):
    """A window as a model is trained on it, EOS at the end of both."""

    source: list[int]
    target: list[int]


def sentinels_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Give the ids of the sentinels, in the order in which they stand for spans: <extra_id_0>, <extra_id_1>, ...

    ConfigError where the tokenizer has less than two, for one ends the target.
    """
    for name in _NAMES:
        found: list[int] = []
        for number in count():
            sentinel = tokenizer.inner.token_to_id(name.format(number))
            if sentinel is None:
                break
            found.append(sentinel)
        if len(found) > 1:
            return tuple(found)
    raise ConfigError(
        "span corruption needs sentinels, and the tokenizer has no <extra_id_0> and <extra_id_1>: take a model of T5's"
        " family, or train on the text with another dataset."
    )


def corrupted(
    ids: Sequence[int], *, sentinels: Sequence[int], eos_id: int, max_tokens: int, seed: int = 0
) -> Iterator[Corrupted]:
    """Cut a text's ids into windows of nearly one length, and yield each with spans dropped.

    Source and target have at most `max_tokens` tokens each, the id that starts a decoder counted, and a window has no
    more spans than there are sentinels for. What is dropped follows from the text's tokens and `seed` alone, so every
    epoch drops the same. DataError where the text has less than two tokens or holds a sentinel, ConfigError where not
    even two tokens fit.
    """
    if len(ids) < 2:
        raise DataError("the text has less than two tokens, and span corruption drops some and keeps some")
    if not set(sentinels).isdisjoint(ids):
        raise DataError("the text holds a token that stands for a dropped span, such as <extra_id_0>; remove it")
    longest = window_tokens(max_tokens=max_tokens, sentinels=len(sentinels))
    for number, window in enumerate(np.array_split(np.asarray(ids, dtype=np.int32), -(-len(ids) // longest))):
        source, target = corrupt(window, sentinels=sentinels, seed=seed, row=number)
        yield Corrupted([*source, eos_id], [*target, eos_id])


@cache
def window_tokens(*, max_tokens: int, sentinels: int) -> int:
    """Give the longest window of which source and target fit into `max_tokens`, and whose spans have sentinels.

    ConfigError where there is none.
    """
    if not _fits(2, max_tokens=max_tokens, sentinels=sentinels):
        raise ConfigError(f"--max-tokens is {max_tokens}, and a dropped token between two sentinels takes 5; raise it.")
    return next(size - 1 for size in count(3) if not _fits(size, max_tokens=max_tokens, sentinels=sentinels))


def _fits(size: int, *, max_tokens: int, sentinels: int) -> bool:
    dropped, spans = _amounts(size)
    # EOS ends the source; the target has the decoder's start, its last sentinel and EOS besides.
    return max(size - dropped + spans + 1, dropped + spans + 3) <= max_tokens and spans < sentinels


def _amounts(size: int) -> tuple[int, int]:
    """How many tokens of a window are dropped, at least one of them and not all, and in how many spans."""
    dropped = min(max(round(size * DROPPED_SHARE), 1), size - 1)
    return dropped, max(round(dropped / MEAN_SPAN), 1)


def corrupt(window: NDArray[np.int32], *, sentinels: Sequence[int], seed: int, row: int) -> Corrupted:
    """Drop spans of a window of at least two ids: source and target, without EOS.

    A pure function of its arguments, on every machine and with every version of numpy. `row` tells windows with the
    same ids apart.
    """
    dropped, spans = _amounts(len(window))
    content = hashlib.sha256(window.astype("<i4").tobytes()).digest()
    draws = np.random.PCG64(np.random.SeedSequence([seed, row, int.from_bytes(content, "little")]))
    kept = len(window) - dropped
    # Where the dropped tokens are cut into spans, and which of the gaps before, between and after kept tokens hold one.
    cuts = _chosen(spans - 1, of=dropped - 1, draws=draws) + 1
    gaps = _chosen(spans, of=kept + 1, draws=draws)
    lengths = np.diff(cuts, prepend=0, append=dropped)
    starts = gaps + np.concatenate(([0], cuts))
    source: list[int] = []
    target: list[int] = []
    end = 0
    for sentinel, start, length in zip(sentinels, starts.tolist(), lengths.tolist(), strict=False):
        source += [*window[end:start].tolist(), sentinel]
        end = start + length
        target += [sentinel, *window[start:end].tolist()]
    return Corrupted([*source, *window[end:].tolist()], [*target, sentinels[spans]])


def _chosen(number: int, *, of: int, draws: np.random.PCG64) -> NDArray[np.int64]:
    """Draw so many of the numbers below `of`, without repetition, in rising order."""
    # numpy keeps raw bits and SeedSequence the same for ever, but not what Generator.choice makes of them.
    return np.sort(np.argsort(draws.random_raw(of), kind="stable")[:number])
