"""Beam search: follow a few likely texts side by side, and give the best of those that ended.

The rules are those of transformers with its defaults. A text's score is the sum of its tokens' log-probabilities
divided by length ** length_penalty, its stop id counted. As many ended texts are kept as there are beams, and the
search goes on as long as the best text that has not ended scores better, at its length, than the worst of those.

Shapes: B beams, V ids in the vocabulary, C candidates.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_pipe.generate.readers import Reader
from qlora_pipe.generate.steps import require_finite

_PLACE_BITS = 32


class _Candidates(NamedTuple):
    """Texts one token longer, the likeliest first; a tensor each, [C]."""

    scores: Tensor
    """Sums of log-probabilities, float32."""
    rows: Tensor
    """The beams that they go on from, int64."""
    tokens: Tensor
    """What they add, int64."""


class _Ended(NamedTuple):
    """A text that ended with a stop id, or where there was no more room."""

    score: float
    ids: list[int]


def search(
    reader: Reader,
    ids: Sequence[int],
    *,
    room: int,
    beams: int,
    length_penalty: float,
    stop_ids: Collection[int],
) -> Iterator[int]:
    """Yield the best text of at most `room` tokens that follows `ids`, its stop id left out.

    Of candidates with one score the better beam's comes first, then the one of the smaller id; of ended texts the one
    that ended first. NonFiniteError where the logits of a beam hold NaN or infinity.
    """
    logits = reader.begin(ids, room=room, rows=beams)
    # At first every row holds the same text: one of them goes on, in as many ways as there are beams.
    scores = torch.full((beams,), -math.inf, device=logits.device)
    scores[0] = 0
    texts: list[list[int]] = [[]] * beams
    ended: list[_Ended] = []
    for length in range(1, room + 1):
        # So many that, whatever stops there are among them, there are as many others as beams.
        keys = _best(logits, scores, count=beams * (1 + len(stop_ids)))
        finite = logits.amax(-1).isfinite().all()
        # The one copy to the host, at which it waits for the step.
        *copied, is_finite = torch.cat((keys, finite.long()[None])).tolist()
        require_finite(bool(is_finite), len(ids) + length - 1)
        found = _opened(torch.tensor(copied), vocabulary=logits.shape[1])
        going_on: list[int] = []
        for place, (score, row, token) in enumerate(zip(*(each.tolist() for each in found), strict=True)):
            if score == -math.inf:
                break
            stops = token in stop_ids
            if not stops and length < room:
                going_on.append(place)
            elif place < beams:
                text = texts[row] if stops else [*texts[row], token]
                ended.append(_Ended(score / length**length_penalty, text))
        going_on = going_on[:beams]
        # A stable sort: what ended first comes first.
        ended = sorted(ended, key=lambda text: -text.score)[:beams]
        if not going_on:
            break
        if len(ended) == beams and float(found.scores[going_on[0]]) / length**length_penalty <= ended[-1].score:
            break
        # Rows that nothing is left for repeat another, and are never heard.
        places = going_on + going_on[:1] * (beams - len(going_on))
        texts = [
            [*texts[row], token] for row, token in zip(*(each[places].tolist() for each in found[1:]), strict=True)
        ]
        scores, rows, tokens = _opened(keys[torch.tensor(places, device=keys.device)], vocabulary=logits.shape[1])
        scores[len(going_on) :] = -math.inf
        reader.reorder(rows)
        logits = reader.go_on(tokens)
    yield from ended[0].ids


def _best(logits: Tensor, scores: Tensor, *, count: int) -> Tensor:
    """Logits [B, V] after texts of these scores [B] -> the keys [C], int64, of the best candidates, the best first.

    A key is the score's distance from 0 as float32 has it in bits, which for numbers of one sign are in order, and
    below them the candidate's place among B * V: no two are equal, so every device finds the same order.
    """
    summed = (logits.log_softmax(-1) + scores[:, None]).flatten()
    distances = summed.abs().view(torch.int32).long()
    keys = distances << _PLACE_BITS | torch.arange(len(summed), device=summed.device)
    return keys.topk(min(count, len(keys)), largest=False).values


def _opened(keys: Tensor, *, vocabulary: int) -> _Candidates:
    """Read what keys say."""
    places = keys & ((1 << _PLACE_BITS) - 1)
    scores = -(keys >> _PLACE_BITS).int().view(torch.float32)
    return _Candidates(scores, places // vocabulary, places % vocabulary)
