"""Attention of one new token over a key-value cache, as in generation: turn, store and attend in one.

Shapes: B sequences, H query heads, KV key heads, each serving G = H / KV query heads in a row (arXiv 2305.13245), D
components of a head, C positions that the cache has room for.

Where the token goes is read on the device, so every step is the same work: a CUDA graph of it can be replayed. Only the
filled positions that the token sees are read. The result depends on nothing but them: not on C, not on what lies behind
them or before a window, and not on a window that they all lie in.
"""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from qlora_kernels.rotary import rotate_reference
from qlora_kernels.way import way_of

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


class Rule(NamedTuple):
    """How scores are made of queries and keys, and which there are."""

    window: int | None
    """Positions that a token sees, itself among them; None for all so far."""
    softcap: float | None
    """Scores s become softcap * tanh(s / softcap)."""
    scale: float
    """What q k^T is multiplied with."""


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    cached_keys: Tensor,
    cached_values: Tensor,
    position: Tensor,
    cosines: Tensor | None = None,
    sines: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Store a token's keys and values [B, KV, 1, D] in a cache, and attend from its queries [B, H, 1, D] to all so far.

    The caches [B, KV, C, D] are contiguous and hold `position` tokens, an int64 [1] below C on their device; the new
    one is written behind them. With cosines and sines [..., D], queries and keys are first turned by them (rotary
    embeddings, arXiv 2104.09864), rounded as torch rounds x * cosines + other * sines. Scores are q k^T times `scale`,
    D ** -0.5 by default; with a `softcap` they become softcap * tanh(score / softcap) (arXiv 2408.00118), and with a
    `window` the token sees only the last so many positions, its own among them. Sums are in float32, the result
    [B, 1, H * D] is rounded once. There is no gradient. Raises ValueError for shapes or types that do not fit, and for
    a window or a cap that is not above 0.
    """
    _check(queries, keys, values, cached_keys, cached_values)
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"a window of {window} or a cap of {softcap} leaves nothing to attend to: both are above 0")
    turns = None if cosines is None or sines is None else (cosines, sines)
    if _goes_to_triton(queries):
        # Imported here because Triton exists on Linux only and takes 0.4 s, which a run on a CPU need not pay.
        from qlora_kernels.decode_attention_triton import decode_attention_triton  # noqa: PLC0415

        attend: Callable[..., Tensor] = decode_attention_triton
    else:
        attend = decode_attention_reference
    return attend(
        queries,
        keys,
        values,
        cached_keys=cached_keys,
        cached_values=cached_values,
        position=position,
        turns=turns,
        rule=Rule(window, softcap, 1 / math.sqrt(cached_keys.shape[3]) if scale is None else scale),
    )


def decode_attention_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    cached_keys: Tensor,
    cached_values: Tensor,
    position: Tensor,
    turns: tuple[Tensor, Tensor] | None,
    rule: Rule,
) -> Tensor:
    """The meaning, in plain torch, over all of the cache with what is not seen masked; a graph can hold it too."""
    if turns is not None:
        # Those of one position.
        cosines, sines = (table.reshape(1, -1) for table in turns)
        queries, keys = rotate_reference(queries, cosines, sines), rotate_reference(keys, cosines, sines)
    cached_keys.index_copy_(2, position, keys)
    cached_values.index_copy_(2, position, values)
    wide = torch.promote_types(queries.dtype, torch.float32)
    n_batch, n_kv, capacity, size = cached_keys.shape
    place_C = torch.arange(capacity, device=position.device)
    seen_C = place_C <= position
    if rule.window is not None:
        seen_C &= place_C > position - rule.window
    # What lies behind the filled positions may be anything, NaN too.
    stored_C1 = seen_C[:, None]
    keys_BKCD = torch.where(stored_C1, cached_keys, 0).to(wide)
    values_BKCD = torch.where(stored_C1, cached_values, 0).to(wide)
    queries_BKGD = queries.reshape(n_batch, n_kv, -1, size).to(wide)
    scores_BKGC = (queries_BKGD @ keys_BKCD.transpose(2, 3)) * rule.scale
    if rule.softcap is not None:
        scores_BKGC = torch.tanh(scores_BKGC / rule.softcap) * rule.softcap
    mixed_BKGD = scores_BKGC.masked_fill(~seen_C, float("-inf")).softmax(-1) @ values_BKCD
    return mixed_BKGD.to(queries.dtype).reshape(n_batch, 1, -1)


def _goes_to_triton(queries: Tensor) -> bool:
    if way_of(queries) != "triton" or queries.dtype not in _DTYPES:
        return False
    # Triton's interpreter gets sums and products in bfloat16 wrong.
    return bool(queries.is_cuda) or queries.dtype != torch.bfloat16


def _check(queries: Tensor, keys: Tensor, values: Tensor, cached_keys: Tensor, cached_values: Tensor) -> None:
    n_batch, n_kv, _, size = cached_keys.shape
    n_heads = queries.shape[1]
    wanted = [(n_batch, n_heads, 1, size), *[(n_batch, n_kv, 1, size)] * 2, tuple(cached_keys.shape)]
    found = [tuple(part.shape) for part in (queries, keys, values, cached_values)]
    if found != wanted or n_heads % n_kv or size % 2:
        raise ValueError(
            f"queries, keys and values of shapes {[list(shape) for shape in found[:3]]} do not fit caches of shapes"
            f" {list(cached_keys.shape)} and {list(found[3])}: [B, H, 1, D], twice [B, KV, 1, D], and twice"
            " [B, KV, C, D] do, with H a multiple of KV and D even"
        )
    dtypes = {part.dtype for part in (queries, keys, values, cached_keys, cached_values)}
    if len(dtypes) > 1 or not (cached_keys.is_contiguous() and cached_values.is_contiguous()):
        raise ValueError(
            f"queries, keys, values and both caches must have one type, and the caches be contiguous; found {dtypes}"
        )
