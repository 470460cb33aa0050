"""Continue a sequence of tokens, or answer one."""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_pipe.errors import UsageProblem
from qlora_pipe.generate.beams import search
from qlora_pipe.generate.graph import CapturedSteps
from qlora_pipe.generate.readers import CausalModel, CausalReader, Reader, Seq2SeqReader
from qlora_pipe.generate.steps import EagerSteps, ReaderSteps, Steps, require_finite, told
from qlora_pipe.nn.cache import KVCache
from qlora_pipe.nn.seq2seq import Seq2SeqModel

# What probabilities are fractions of. In double, it and all below are exact.
_WHOLE = 2**52
# Powers of any length that fits into memory are numbers.
_STEEPEST = 10


class _Choice(NamedTuple):
    """How the next tokens are chosen, as `generate` was told."""

    temperature: float
    top_p: float
    seed: int
    beams: int
    length_penalty: float


def generate(
    model: CausalModel,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
    steps: Steps | None = None,
) -> Iterator[int]:
    """Yield the ids that follow `ids`, until one of `stop_ids` (not yielded), max_new_tokens, or the context's end.

    Temperature 0 takes the likeliest token each time. Above 0, tokens are drawn by softmax(logits / temperature) from
    the likeliest ones that together hold a probability of top_p (nucleus sampling, arXiv 1904.09751), by a generator of
    this call's own: a seed gives the same tokens again and leaves torch's generators alone.

    With several beams, so many texts are followed side by side, and the one whose log-probability divided by
    length ** length_penalty is greatest is given once all are known (qlora_pipe/generate/beams.py).

    `steps` runs the model; without it `steps_of(model)` does, anew for each call. Given again for the next text, once
    this one has ended, it saves capturing a step again. Beams are run without it.

    The context's end is the longest sequence the model's config vouches for: `max_position_embeddings`, or what its
    RoPE scaling makes of it. UsageProblem where `ids` is empty or leaves no room in it, or where settings contradict
    each other; ValueError where one makes no sense or the model is in training mode; NonFiniteError as soon as the
    logits hold NaN or infinity.
    """
    choice = _Choice(temperature, top_p, seed, beams, length_penalty)
    _require_sense(model, choice, max_new_tokens)
    if not ids:
        raise UsageProblem("there is nothing to continue: the prompt has no tokens, and the tokenizer adds none.")
    if len(ids) >= model.context:
        raise UsageProblem(
            f"the prompt has {len(ids)} tokens, and the model's context ends at {model.context}; shorten the prompt."
        )
    room = min(max_new_tokens, model.context - len(ids))
    if room == 0:
        return iter(())
    if beams > 1:
        return _searched(CausalReader(model), ids, room, choice, stop_ids)
    return _followed(steps_of(model) if steps is None else steps, ids, room, choice, stop_ids)


def generate_seq2seq(
    model: Seq2SeqModel,
    source_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> Iterator[int]:
    """Yield the ids that an encoder-decoder model gives for a source, until one of `stop_ids` or max_new_tokens.

    Tokens are chosen as by `generate`, which says what is refused.
    """
    choice = _Choice(temperature, top_p, seed, beams, length_penalty)
    _require_sense(model, choice, max_new_tokens)
    if not source_ids:
        raise UsageProblem("there is nothing to answer: the prompt has no tokens, and the tokenizer adds none.")
    if max_new_tokens == 0:
        return iter(())
    reader, begun = Seq2SeqReader(model, source_ids), [model.start_id]
    if beams > 1:
        return _searched(reader, begun, max_new_tokens, choice, stop_ids)
    return _followed(ReaderSteps(reader), begun, max_new_tokens, choice, stop_ids)


def require_one_way(*, beams: int, temperature: float) -> None:
    """Raise UsageProblem where tokens were to be drawn, and the likeliest text to be searched for as well."""
    if beams > 1 and temperature > 0:
        raise UsageProblem(
            f"beams is {beams} and temperature {temperature:g}: a search for the likeliest text draws no tokens; set"
            " temperature to 0 or beams to 1."
        )


def steps_of(model: CausalModel) -> Steps:
    """The fastest way of running a model whose weights stay where they are: captured on a GPU, else plain."""
    cache = model.new_cache(1, 0)
    # A cache that is not ours may grow, which nothing captured can do.
    return CapturedSteps(model) if isinstance(cache, KVCache) and cache.stored.is_cuda else EagerSteps(model)


def _require_sense(model: CausalModel | Seq2SeqModel, choice: _Choice, max_new_tokens: int) -> None:
    if model.training:
        raise ValueError("the model is in training mode, where dropout disturbs generation; call model.eval() first.")
    temperature, top_p, _, beams, length_penalty = choice
    if not (math.isfinite(temperature) and temperature >= 0 and 0 < top_p <= 1 and max_new_tokens >= 0):
        raise ValueError(
            f"temperature {temperature}, top_p {top_p}, max_new_tokens {max_new_tokens}: temperature and max_new_tokens"
            " must be at least 0, top_p above 0 and at most 1."
        )
    if not (beams >= 1 and abs(length_penalty) <= _STEEPEST):
        raise ValueError(
            f"beams {beams}, length_penalty {length_penalty}: beams must be at least 1, length_penalty at least"
            f" -{_STEEPEST} and at most {_STEEPEST}."
        )
    require_one_way(beams=beams, temperature=temperature)


def _searched(
    reader: Reader, ids: Sequence[int], room: int, choice: _Choice, stop_ids: Collection[int]
) -> Iterator[int]:
    beams, length_penalty = choice.beams, choice.length_penalty
    return search(reader, ids, room=room, beams=beams, length_penalty=length_penalty, stop_ids=stop_ids)


def _followed(steps: Steps, ids: Sequence[int], room: int, choice: _Choice, stop_ids: Collection[int]) -> Iterator[int]:
    tokens = _drawn(steps, ids, room, choice) if choice.temperature > 0 else _likeliest(steps, ids, room)
    # Not a generator up to here: what was refused, was refused at once.
    return itertools.takewhile(lambda token: token not in stop_ids, tokens)


def _likeliest(steps: Steps, ids: Sequence[int], room: int) -> Iterator[int]:
    steps.begin(ids, room=room)
    for position, (top, token) in enumerate(steps.likeliest(room), len(ids)):
        require_finite(math.isfinite(top), position)
        yield token


def _drawn(steps: Steps, ids: Sequence[int], room: int, choice: _Choice) -> Iterator[int]:
    draws = torch.Generator().manual_seed(choice.seed)
    end = len(ids) + room
    steps.begin(ids, room=room)
    for position in range(len(ids), end):
        fraction = float(torch.rand((), dtype=torch.float64, generator=draws))
        top, token = told(*_draw(steps.logits, temperature=choice.temperature, top_p=choice.top_p, fraction=fraction))
        require_finite(math.isfinite(top), position)
        yield token
        if position + 1 < end:
            steps.go_on(token)


def _draw(logits: Tensor, *, temperature: float, top_p: float, fraction: float) -> tuple[Tensor, Tensor]:
    """Give the largest of logits [V], and the id at a `fraction`, in [0, 1), of what may be drawn; both on its device.

    Where logits are not finite, any id.
    """
    falling, ids = logits.sort(descending=True, stable=True)
    # Whole numbers sum to the same in every order: a GPU adds up in another one each time.
    shares = ((falling.double() / temperature).softmax(-1) * _WHOLE).long()
    up_to = shares.cumsum(-1)
    # The likeliest token has nothing before it and always stays.
    kept = torch.where(up_to - shares < top_p * _WHOLE, shares, 0).sum()
    target = (kept * fraction).long().minimum(kept - 1)
    place = torch.searchsorted(up_to, target, right=True).clamp(max=len(ids) - 1)
    return falling[0], ids.gather(0, place[None])
