"""Causal attention whose scores are capped (arXiv 2408.00118), or that reaches back no further than a window.

No tensor of all T x S scores is ever in memory, in backward neither: they are made for a few queries at a time, of the
keys that these see, or in a kernel that FlexAttention makes (arXiv 2412.05496).

Shapes: B rows of T tokens, S keys, H query heads, KV key heads, each serving G = H / KV query heads in a row, D
components of a head. The T queries are the last T of the S positions.
"""

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from math import isqrt
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from qlora_pipe.nn.packing import Packing

# Scores held at a time on the way without a kernel for it: 16 MiB in float32.
_SCORES = 1 << 22
# Queries at a time, however short a window is.
_LEAST_CHUNK = 64


class Rule(NamedTuple):
    """How scores are made, and which there are."""

    window: int | None
    """Positions that a query sees, itself among them; None for all up to itself."""
    softcap: float | None
    """Scores s become softcap * tanh(s / softcap); None leaves them as they are."""
    scale: float
    """What q k^T is multiplied with."""


def ruled_attention(queries: Tensor, keys: Tensor, values: Tensor, rule: Rule) -> Tensor:
    """Attend from queries [B, H, T, D] to keys and values [B, KV, S, D] as `rule` has it: [B, H, T, D]."""
    # To compile a kernel for each new kind of prompt would take longer than the prompt.
    if flex_takes(queries) and queries.shape[2] > 1 and not torch.is_inference_mode_enabled():
        return flex_ruled(queries, keys, values, rule)
    return cast(Tensor, _Chunked.apply(rule, queries, keys, values))  # type: ignore[no-untyped-call]


def flex_takes(queries: Tensor) -> bool:
    """Say whether FlexAttention has a kernel for these."""
    return queries.is_cuda and queries.dtype != torch.float64


class _Chunked(torch.autograd.Function):
    """Some rows and a chunk of their queries at a time, in float32 at least; backward makes a chunk's scores again."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mixed = torch.empty_like(queries)
        sums = torch.empty(queries.shape[:3], dtype=_wide(queries), device=queries.device)
        for piece in _pieces(queries, keys, values, rule):
            scores, _ = piece.scores(rule)
            piece_sums = scores.logsumexp(-1)
            sums[piece.here] = _by_head(piece_sums, piece.group)
            weights = scores.sub_(piece_sums[..., None]).exp_()
            mixed[piece.here] = _by_head(weights @ piece.values, piece.group)
        ctx.save_for_backward(queries, keys, values, sums)
        ctx.rule = rule
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        queries, keys, values, sums = ctx.saved_tensors
        rule, wide = ctx.rule, sums.dtype
        d_queries = torch.empty_like(queries)
        d_keys, d_values = (torch.zeros_like(each, dtype=wide) for each in (keys, values))
        for piece in _pieces(queries, keys, values, rule):
            scores, slopes = piece.scores(rule, with_slopes=True)
            weights = scores.sub_(_by_key_head(sums[piece.here], piece.group)[..., None]).exp_()
            d_mixed = _by_key_head(gradient[piece.here], piece.group).to(wide)
            d_values[piece.there] += weights.mT @ d_mixed
            # The softmax' gradient: weights * (d_weights - the sum over the keys of weights * d_weights).
            d_scores = (d_mixed @ piece.values.mT).mul_(weights)
            d_scores.sub_(weights.mul_(d_scores.sum(-1, keepdim=True)))
            if slopes is not None:
                d_scores.mul_(slopes)
            d_queries[piece.here] = _by_head((d_scores @ piece.keys).mul_(rule.scale), piece.group)
            d_keys[piece.there] += (d_scores.mT @ piece.queries).mul_(rule.scale)
        return None, d_queries, d_keys.to(keys.dtype), d_values.to(values.dtype)


class _Piece(NamedTuple):
    """Some queries of some rows, and the keys and values that they see."""

    here: tuple[slice, slice, slice]
    """Where they lie in the queries."""
    there: tuple[slice, slice, slice]
    """Where what they see lies in keys and values."""
    group: int
    queries: Tensor
    """[b, KV, G * t, D]: those that share a key head below each other, so that a product meets each key once."""
    keys: Tensor
    """[b, KV, s, D], as the values."""
    values: Tensor
    unseen: Tensor
    """[t, s]: pairs that the rule leaves out."""

    def scores(self, rule: Rule, *, with_slopes: bool = False) -> tuple[Tensor, Tensor | None]:
        """Give the scores [b, KV, G * t, s], and what the gradient of capped ones is multiplied with."""
        scores, slopes = (self.queries @ self.keys.mT).mul_(rule.scale), None
        if rule.softcap is not None:
            scores.div_(rule.softcap).tanh_()
            slopes = 1 - scores.square() if with_slopes else None
            scores.mul_(rule.softcap)
        # The mask is that of each query head in the group.
        scores.view(*scores.shape[:2], self.group, *self.unseen.shape).masked_fill_(self.unseen, -torch.inf)
        return scores, slopes


def _pieces(queries: Tensor, keys: Tensor, values: Tensor, rule: Rule) -> Iterator[_Piece]:
    n_rows, n_heads, n_queries, _ = queries.shape
    n_keys, before = keys.shape[2], keys.shape[2] - n_queries
    window = n_keys if rule.window is None else min(rule.window, n_keys)
    rows_at_once = min(n_rows, max(1, _SCORES // (n_heads * n_queries * min(n_keys, n_queries + window - 1))))
    size = _chunk(_SCORES // (rows_at_once * n_heads), n_keys, window)
    wide, everything = _wide(queries), slice(None)
    for start in range(0, n_queries, size):
        end = min(start + size, n_queries)
        seen = slice(max(0, before + start - window + 1), before + end)
        away = torch.arange(before + start, before + end, device=queries.device)[:, None]
        away = away - torch.arange(seen.start, seen.stop, device=queries.device)
        unseen = (away < 0) | (away >= window)
        for row in range(0, n_rows, rows_at_once):
            rows = slice(row, row + rows_at_once)
            here, there = (rows, everything, slice(start, end)), (rows, everything, seen)
            group = n_heads // keys.shape[1]
            q = _by_key_head(queries[here], group).to(wide)
            yield _Piece(here, there, group, q, keys[there].to(wide), values[there].to(wide), unseen)


def _chunk(pairs: int, n_keys: int, window: int) -> int:
    """How many queries to take at a time, so that they and the keys they see make at most so many pairs."""
    # t queries see t + window - 1 keys, and all of them at most.
    back = window - 1
    size = max(1, pairs // n_keys, (isqrt(back * back + 4 * pairs) - back) // 2)
    # Of a chunk that is longer than the window, most pairs are made for nothing.
    return min(size, max(window, _LEAST_CHUNK))


def _by_key_head(x: Tensor, group: int) -> Tensor:
    """[b, H, t, ...] -> [b, KV, G * t, ...]."""
    rows, heads, count = x.shape[:3]
    return x.reshape(rows, heads // group, group * count, *x.shape[3:])


def _by_head(x: Tensor, group: int) -> Tensor:
    """[b, KV, G * t, ...] -> [b, H, t, ...]."""
    rows, key_heads, count = x.shape[:3]
    return x.reshape(rows, key_heads * group, count // group, *x.shape[3:])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def flex_ruled(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: Rule,
    *,
    packing: Packing | None = None,
    compiled: bool = True,
) -> Tensor:
    """The same as one kernel, in each sample alone where rows are packed: [B, H, T, D].

    Not compiled it shows what the kernel is told, forward only, and holds all scores at once.
    """
    device = queries.device
    if packing is None:
        blocks = _blocks(queries.shape[2], keys.shape[2], rule.window, device, compiled)
    else:
        blocks = _packed_blocks(packing, rule.window, compiled)
    attend = _compiled() if compiled else _flex
    # A tensor, for a number would be compiled into the kernel, or be one that it can't take.
    softcap = None if rule.softcap is None else torch.full((), rule.softcap, device=device)
    return attend(queries, keys, values, softcap, scale=rule.scale, blocks=blocks)


def _flex(
    queries: Tensor, keys: Tensor, values: Tensor, softcap: Tensor | None, *, scale: float, blocks: BlockMask
) -> Tensor:
    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return score if softcap is None else torch.tanh(score / softcap) * softcap

    shares = queries.shape[1] != keys.shape[1]
    return flex_attention(queries, keys, values, score_mod=capped, block_mask=blocks, scale=scale, enable_gqa=shares)


@cache
def _compiled() -> Callable[..., Tensor]:
    # Lengths differ from batch to batch: at the second the compiler makes a kernel that takes any.
    return torch.compile(_flex)


@lru_cache(maxsize=16)
def _blocks(n_queries: int, n_keys: int, window: int | None, device: torch.device, compiled: bool) -> BlockMask:
    """Which blocks of keys a block of queries sees; compiled, no T x S mask is made on the way."""
    before = torch.full((), n_keys - n_queries, device=device)
    reach = torch.full((), n_keys if window is None else window, device=device)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        away = query + before - key
        return (away >= 0) & (away < reach)

    make = torch.compile(create_block_mask) if compiled else create_block_mask
    return make(sees, None, None, n_queries, n_keys, device=device)


# Every layer asks for those of its batch, and all batches of a window may be at the same layer.
@lru_cache(maxsize=32)
def _packed_blocks(packing: Packing, window: int | None, compiled: bool) -> BlockMask:
    """The same for packed rows, in which no sample sees another."""
    sample_BT = (packing.positions == 0).cumsum(-1, dtype=torch.int32)
    n_rows, width = sample_BT.shape
    reach = torch.full((), width if window is None else window, device=sample_BT.device)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        away = query - key
        return (sample_BT[row, query] == sample_BT[row, key]) & (away >= 0) & (away < reach)

    make = torch.compile(create_block_mask) if compiled else create_block_mask
    return make(sees, n_rows, None, width, width, device=sample_BT.device)
