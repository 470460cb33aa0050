"""Causal attention over queries that may have fewer keys and values than heads."""

import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from qlora_kernels.product_type import product_type
from qlora_pipe.nn.packing import Packing


class Scores(NamedTuple):
    """How a layer's attention makes its scores; what is None is as everywhere."""

    window: int | None = None
    """How many positions a query sees, itself among them; None for all up to itself."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""
    scale: float | None = None
    """What q k^T is multiplied with; None for D ** -0.5."""


PLAIN = Scores()


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, packing: Packing | None = None, scores: Scores = PLAIN
) -> Tensor:
    """Attend from each position to itself and to those before it, in its own sample where a row holds several.

    queries [B, H, T, D]; keys and values [B, KV, S, D], H a multiple of KV: each key head serves H / KV query heads
    in a row (arXiv 2305.13245). The T queries are the last T of the S positions; with a packing T is S. Gives
    [B, T, H * D]; at padding it is finite and means nothing.
    """
    if packing is None:
        return _whole(queries, keys, values, scores)
    if _flash_takes(queries) and scores == PLAIN:
        return flash_packed(queries, keys, values, packing)
    return _sample_by_sample(queries, keys, values, packing, scores)


def flash_packed(queries: Tensor, keys: Tensor, values: Tensor, packing: Packing) -> Tensor:
    """The same for packed rows in one kernel, which is told where samples begin (FlashAttention-2, arXiv 2307.08691).

    It takes float16 and bfloat16 on a GPU from the Ampere generation on, and needs torch 2.10.
    """
    # Older versions of torch have no such module.
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    # [B, H, T, D] -> [B * T, H, D], which is how the projections made them: no copy.
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (queries, keys, values))
    known = _arguments(varlen_attn)
    settings: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and "enable_gqa" in known:
        settings["enable_gqa"] = True
    elif shared > 1:
        k, v = (each.repeat_interleave(shared, dim=1) for each in (k, v))
    # Padding is computed too: left out, it would keep whatever was in memory, and a NaN there would reach gradients.
    starts, longest = packing.boundaries, packing.longest
    mixed = cast(Tensor, varlen_attn(q, k, v, starts, starts, longest, longest, **settings))
    return mixed.view(queries.shape[0], queries.shape[2], -1)


def _whole(queries: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
    # A processor without 16-bit products would take many times as long.
    dtype, wide = queries.dtype, product_type(queries)
    queries, keys, values = (each.to(wide) for each in (queries, keys, values))
    n_queries, n_keys = queries.shape[2], keys.shape[2]
    reaches_all = scores.window is None or scores.window >= n_keys
    mask = None
    if not reaches_all or 1 < n_queries < n_keys or scores.softcap is not None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=queries.device).tril(n_keys - n_queries)
        if scores.window is not None:
            mask = mask.triu(n_keys - n_queries - scores.window + 1)
    if scores.softcap is not None:
        mixed = _capped(queries, keys, values, mask=mask, scores=scores)
    else:
        mixed = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and n_queries > 1,
            scale=scores.scale,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
    return mixed.to(dtype).transpose(1, 2).flatten(2)


def _capped(queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention with capped scores, all of which exist at once: [B, H, T, D]."""
    assert scores.softcap is not None
    shared = queries.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(shared, dim=1) for each in (keys, values))
    scale = queries.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    raw = (queries @ keys.mT * scale).float() if queries.dtype != torch.float64 else queries @ keys.mT * scale
    capped = torch.tanh(raw / scores.softcap) * scores.softcap
    if mask is not None:
        capped = capped.masked_fill(~mask, -torch.inf)
    return capped.softmax(-1).to(queries.dtype) @ values


def _sample_by_sample(queries: Tensor, keys: Tensor, values: Tensor, packing: Packing, scores: Scores) -> Tensor:
    """Attend in each sample as if it were alone: no mask, and no product of two samples is ever computed."""
    mixed = []
    # A split has one backward for all its pieces; slices would make a gradient of the whole for each.
    rows = zip(*(torch.split(each, 1) for each in (queries, keys, values)), strict=True)
    for lengths, row in zip(packing.lengths, rows, strict=True):
        *samples, padding = zip(*(torch.split(each, list(lengths), dim=2) for each in row), strict=True)
        mixed += [_whole(q, k, v, scores) for q, k, v in samples]
        mixed.append(torch.zeros_like(padding[0]).transpose(1, 2).flatten(2))
    # Rows end to end, in one copy.
    return torch.cat(mixed, dim=1).view(queries.shape[0], queries.shape[2], -1)


def _flash_takes(queries: Tensor) -> bool:
    head_dim = queries.shape[-1]
    return (
        queries.is_cuda
        and queries.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(queries.device) >= (8, 0)
        and _torch_has_flash()
    )


@cache
def _torch_has_flash() -> bool:
    return find_spec("torch.nn.attention.varlen") is not None


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    """What a function of torch takes, which differs between its versions."""
    return frozenset(inspect.signature(function).parameters)
