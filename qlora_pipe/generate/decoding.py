"""Continue a sequence of tokens, one at a time."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qlora_pipe.errors import NonFiniteError, UsageProblem
from qlora_pipe.nn.cache import KVCache


class CausalModel(Protocol):
    """What generation asks of a causal model, whatever its family."""

    training: bool

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""

    def hidden(self, ids: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Ids [B, T] -> last hidden states [B, T, D], the tokens added to the cache."""

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., vocabulary]."""

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache."""


def generate(
    model: CausalModel,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the ids that follow `ids`, until one of `stop_ids` (not yielded), max_new_tokens, or the context's end.

    Temperature 0 takes the likeliest token each time. Above 0, tokens are drawn by softmax(logits / temperature) from
    the likeliest ones that together hold a probability of top_p (nucleus sampling, arXiv 1904.09751), by a generator of
    this call's own: a seed gives the same tokens again and leaves torch's generators alone.

    The context's end is the longest sequence the model's config vouches for: `max_position_embeddings`, or what its
    RoPE scaling makes of it. UsageProblem where `ids` is empty or leaves no room in it; ValueError where a setting
    makes no sense or the model is in training mode; NonFiniteError as soon as the logits hold NaN or infinity.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout disturbs generation; call model.eval() first.")
    if not (math.isfinite(temperature) and temperature >= 0 and 0 < top_p <= 1 and max_new_tokens >= 0):
        raise ValueError(
            f"temperature {temperature}, top_p {top_p}, max_new_tokens {max_new_tokens}: temperature and max_new_tokens"
            " must be at least 0, top_p above 0 and at most 1."
        )
    if not ids:
        raise UsageProblem("there is nothing to continue: the prompt has no tokens, and the tokenizer adds none.")
    if len(ids) >= model.context:
        raise UsageProblem(
            f"the prompt has {len(ids)} tokens, and the model's context ends at {model.context}; shorten the prompt."
        )
    room = min(max_new_tokens, model.context - len(ids))
    draws = torch.Generator().manual_seed(seed)
    return _continue(model, ids, room, stop_ids, temperature=temperature, top_p=top_p, draws=draws)


def _continue(
    model: CausalModel,
    ids: Sequence[int],
    room: int,
    stop_ids: Collection[int],
    *,
    temperature: float,
    top_p: float,
    draws: torch.Generator,
) -> Iterator[int]:
    cache = model.new_cache(1, len(ids) + room)
    fresh = list(ids)
    for _ in range(room):
        logits = _last_logits(model, fresh, cache)
        if not logits.max().isfinite():
            raise NonFiniteError(
                f"the model's logits hold NaN or infinity at position {cache.length}: its weights or its adapter are"
                " damaged, or overflow in this data type; try --dtype float32."
            )
        token = _draw(logits / temperature, top_p, draws) if temperature > 0 else int(logits.argmax())
        if token in stop_ids:
            return
        yield token
        fresh = [token]


# The mode must not outlive a step: a generator's caller runs between its steps.
@torch.inference_mode()
def _last_logits(model: CausalModel, ids: Sequence[int], cache: KVCache) -> Tensor:
    device = cache.keys[0].device
    states = model.hidden(torch.tensor([ids], device=device), cache=cache)
    return model.head(states[:, -1:])[0, 0].float()


def _draw(logits: Tensor, top_p: float, draws: torch.Generator) -> int:
    # On the CPU and in double, so that a seed gives the same draw wherever the model is.
    probabilities, ids = logits.cpu().double().softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    # The likeliest token has nothing before it and always stays.
    kept = torch.where(before < top_p, probabilities, 0.0)
    return int(ids[torch.multinomial(kept, 1, generator=draws)])
