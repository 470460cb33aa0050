"""Attention with a bias that follows from how far a key lies from its query, as T5 has it (arXiv 1910.10683).

A bias is a table [H, buckets] and a rule from distances to buckets. Of T queries and S keys there are T * S pairs, but
only R = T + S - 1 distances: the bias is laid out by distance, [H, R], once for all layers, and looked up where scores
are made. No T x S tensor of biases or scores is ever in memory, in backward neither.

Shapes: B sequences, H heads, D components of a head.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# Scores held at a time on the way without a kernel for it: 16 MiB in float32.
_SCORES = 1 << 22


def t5_bucket(distances: Tensor, *, buckets: int, farthest: int, both_ways: bool) -> Tensor:
    """Give T5's bucket of each distance key - query: one each for the nearest half, then ever wider ones.

    All distances from `farthest` on share the last bucket. With `both_ways` keys after the query have buckets of their
    own, half of all; else they share bucket 0 with the query itself.
    """
    side = buckets // 2 if both_ways else buckets
    away = distances.abs() if both_ways else (-distances).clamp(min=0)
    each = side // 2
    # Checkpoints are trained with these logarithms in float32; in double a distance at a border would move.
    wide = torch.log(away.clamp(min=each).float() / each) / math.log(farthest / each) * (side - each)
    bucket = torch.where(away < each, away, (each + wide.long()).clamp(max=side - 1))
    return bucket + side * (distances > 0) if both_ways else bucket


def bias_by_distance(table: Tensor, bucket_of: Callable[[Tensor], Tensor], *, queries: int, keys: int) -> Tensor:
    """Lay a table [H, buckets] out by distance: [H, R], float32 at least; column r for key - query = r - (keys - 1).

    `bucket_of` maps distances [R], int64, to buckets. The queries are the last of the positions that the keys have.
    """
    return table.to(_wide(table.dtype))[:, bucket_of(torch.arange(1 - keys, queries, device=table.device))]


def biased_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Attend with scores `scale` * q k^T + bias: to every key or, if causal, to those up to the query's position.

    queries [B, H, T, D], keys and values [B, H, S, D], bias [H, T + S - 1] as `bias_by_distance` gives it, or None for
    none; the T queries are the last T of the S positions, where that is asked for. Of sequence b only the first
    key_lengths[b] keys are there, at least one. Gives [B, T, H * D]. Gradients reach queries, keys, values and bias.
    """
    if bias is not None:
        assert bias.shape == (queries.shape[1], queries.shape[2] + keys.shape[2] - 1), "the bias is of other lengths"
    rule = Rule(causal, scale, key_lengths)
    if queries.is_cuda and queries.dtype != torch.float64 and queries.shape[2] > 1:
        mixed = flex_biased(queries, keys, values, bias=bias, rule=rule)
    else:
        mixed = cast(Tensor, _Chunked.apply(rule, queries, keys, values, bias))  # type: ignore[no-untyped-call]
    return mixed.transpose(1, 2).flatten(2)


class Rule(NamedTuple):
    """How scores are made and which keys there are, as `biased_attention` was told."""

    causal: bool
    scale: float
    key_lengths: Tensor | None


class _Chunked(torch.autograd.Function):
    """Some sequences and a chunk of their queries at a time; backward makes the scores of a chunk again."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, *inputs: Tensor | None) -> Tensor:
        queries, keys, values, bias = cast(tuple[Tensor, Tensor, Tensor, Tensor | None], inputs)
        mixed = torch.empty_like(queries)
        sums = torch.empty(queries.shape[:3], dtype=_wide(queries.dtype), device=queries.device)
        for rows, chunk, column in _chunks(queries, keys):
            scores = _scores(queries[rows, :, chunk], keys[rows], bias, column, rule, rows)
            sums[rows, :, chunk] = scores.logsumexp(-1)
            mixed[rows, :, chunk] = scores.softmax(-1) @ values[rows].to(scores.dtype)
        ctx.save_for_backward(*inputs, sums)
        ctx.rule = rule
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, bias, sums = ctx.saved_tensors
        rule, wide = ctx.rule, sums.dtype
        d_queries = torch.empty_like(queries)
        d_keys, d_values = (torch.zeros_like(each, dtype=wide) for each in (keys, values))
        d_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[4] else None
        for rows, chunk, column in _chunks(queries, keys):
            scores = _scores(queries[rows, :, chunk], keys[rows], bias, column, rule, rows)
            weights = scores.sub_(sums[rows, :, chunk, None]).exp_()
            q, g = (each[rows, :, chunk].to(wide) for each in (queries, gradient))
            d_values[rows] += weights.mT @ g
            # The softmax' gradient: weights * (d_weights - the sum over the keys of weights * d_weights).
            d_scores = (g @ values[rows].to(wide).mT).mul_(weights)
            d_scores.sub_(weights * d_scores.sum(-1, keepdim=True))
            if d_bias is not None:
                d_bias.index_add_(1, column.flatten(), d_scores.sum(0).flatten(1))
            d_queries[rows, :, chunk] = d_scores @ keys[rows].to(wide) * rule.scale
            d_keys[rows] += d_scores.mT @ q * rule.scale
        d_table = None if d_bias is None else d_bias.to(bias.dtype)
        return None, d_queries, d_keys.to(keys.dtype), d_values.to(values.dtype), d_table


def _chunks(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some sequences, some of their queries, and for each of those and each key the column of the bias [chunk, S]."""
    n_sequences, n_heads, n_queries, _ = queries.shape
    n_keys = keys.shape[2]
    size = max(1, min(n_queries, _SCORES // (n_heads * n_keys)))
    together = max(1, _SCORES // (n_heads * n_keys * size))
    for start in range(0, n_queries, size):
        end = min(start + size, n_queries)
        places = torch.arange(start, end, device=queries.device)
        column = torch.arange(n_keys, device=queries.device) - places[:, None] + n_queries - 1
        for first in range(0, n_sequences, together):
            yield slice(first, first + together), slice(start, end), column


def _scores(  # noqa: PLR0917
    queries: Tensor, keys: Tensor, bias: Tensor | None, column: Tensor, rule: Rule, rows: slice
) -> Tensor:
    """queries [rows, H, chunk, D], keys [rows, H, S, D] -> [rows, H, chunk, S], in float32 at least."""
    wide = _wide(queries.dtype)
    n_keys = keys.shape[2]
    scores = (queries.to(wide) @ keys.to(wide).mT).mul_(rule.scale)
    if bias is not None:
        scores.add_(bias[:, column])
    if rule.causal:
        # The distance 0 has column S - 1.
        scores.masked_fill_(column >= n_keys, -torch.inf)
    if rule.key_lengths is not None:
        places = torch.arange(n_keys, device=keys.device)
        scores.masked_fill_(places >= rule.key_lengths[rows, None, None, None], -torch.inf)
    return scores


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def flex_biased(
    queries: Tensor, keys: Tensor, values: Tensor, *, bias: Tensor | None, rule: Rule, compiled: bool = True
) -> Tensor:
    """The same as one kernel, which FlexAttention makes (arXiv 2412.05496): [B, H, T, D].

    Not compiled it shows what the kernel is told, forward only, and holds all scores at once.
    """
    reach = _blocks_up_to(queries.shape[2], keys.shape[2], queries.device, compiled) if rule.causal else None
    attend = _compiled() if compiled else _flex
    # A tensor, for a number would be compiled into the kernel, or be one that it can't take.
    last = torch.full((), queries.shape[2] - 1, device=queries.device)
    return attend(queries, keys, values, bias, last, rule=rule, reach=reach)


def _flex(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    last: Tensor,
    *,
    rule: Rule,
    reach: BlockMask | None,
) -> Tensor:
    lengths = rule.key_lengths

    def biased(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = score if bias is None else score + bias[head, key - query + last]
        return found if lengths is None else torch.where(key < lengths[row], found, -torch.inf)

    return flex_attention(queries, keys, values, score_mod=biased, block_mask=reach, scale=rule.scale)


@cache
def _compiled() -> Callable[..., Tensor]:
    # Lengths differ from batch to batch: at the second the compiler makes a kernel that takes any.
    return torch.compile(_flex)


@lru_cache(maxsize=16)
def _blocks_up_to(n_queries: int, n_keys: int, device: torch.device, compiled: bool) -> BlockMask:
    """Which blocks of keys a block of queries reaches; compiled, no T x S mask is made on the way."""
    before = torch.full((), n_keys - n_queries, device=device)

    def reaches(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return key <= query + before

    make = torch.compile(create_block_mask) if compiled else create_block_mask
    return make(reaches, None, None, n_queries, n_keys, device=device)
