"""Continue a sequence of tokens, or answer one."""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_pipe.errors import UsageProblem
from qlora_pipe.generate.graph import CapturedSteps
from qlora_pipe.generate.readers import CausalModel, Seq2SeqReader
from qlora_pipe.generate.steps import EagerSteps, ReaderSteps, Steps, require_finite, told
from qlora_pipe.nn.cache import KVCache
from qlora_pipe.nn.seq2seq import Seq2SeqModel

# What probabilities are fractions of. In double, it and all below are exact.
_WHOLE = 2**52


class _Choice(NamedTuple):
    """How the next tokens are chosen, as `generate` was told."""

    temperature: float
    top_p: float
    seed: int


def generate(
    model: CausalModel,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    steps: Steps | None = None,
) -> Iterator[int]:
    """Yield the ids that follow `ids`, until one of `stop_ids` (not yielded), max_new_tokens, or the context's end.

    Temperature 0 takes the likeliest token each time. Above 0, tokens are drawn by softmax(logits / temperature) from
    the likeliest ones that together hold a probability of top_p (nucleus sampling, arXiv 1904.09751), by a generator of
    this call's own: a seed gives the same tokens again and leaves torch's generators alone.

    `steps` runs the model; without it `steps_of(model)` does, anew for each call. Given again for the next text, once
    this one has ended, it saves capturing a step again.

    The context's end is the longest sequence the model's config vouches for: `max_position_embeddings`, or what its
    RoPE scaling makes of it. UsageProblem where `ids` is empty or leaves no room in it; ValueError where a setting
    makes no sense or the model is in training mode; NonFiniteError as soon as the logits hold NaN or infinity.
    """
    choice = _Choice(temperature, top_p, seed)
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
) -> Iterator[int]:
    """Yield the ids that an encoder-decoder model gives for a source, until one of `stop_ids` or max_new_tokens.

    Tokens are chosen as by `generate`, which says what is refused.
    """
    choice = _Choice(temperature, top_p, seed)
    _require_sense(model, choice, max_new_tokens)
    if not source_ids:
        raise UsageProblem("there is nothing to answer: the prompt has no tokens, and the tokenizer adds none.")
    if max_new_tokens == 0:
        return iter(())
    reader, begun = Seq2SeqReader(model, source_ids), [model.start_id]
    return _followed(ReaderSteps(reader), begun, max_new_tokens, choice, stop_ids)


def steps_of(model: CausalModel) -> Steps:
    """The fastest way of running a model whose weights stay where they are: captured on a GPU, else plain."""
    cache = model.new_cache(1, 0)
    # A cache that is not ours may grow, which nothing captured can do.
    return CapturedSteps(model) if isinstance(cache, KVCache) and cache.stored.is_cuda else EagerSteps(model)


def _require_sense(model: CausalModel | Seq2SeqModel, choice: _Choice, max_new_tokens: int) -> None:
    if model.training:
        raise ValueError("the model is in training mode, where dropout disturbs generation; call model.eval() first.")
    temperature, top_p, _ = choice
    if not (math.isfinite(temperature) and temperature >= 0 and 0 < top_p <= 1 and max_new_tokens >= 0):
        raise ValueError(
            f"temperature {temperature}, top_p {top_p}, max_new_tokens {max_new_tokens}: temperature and max_new_tokens"
            " must be at least 0, top_p above 0 and at most 1."
        )


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
