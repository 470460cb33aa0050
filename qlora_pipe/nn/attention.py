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
from qlora_pipe.nn.ruled_attention import Rule, flex_ruled, flex_takes, ruled_attention


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
    if scores.window is not None and scores.window >= packing.longest:
        scores = scores._replace(window=None)
    if scores.softcap is None and _flash_takes(queries, scores):
        return flash_packed(queries, keys, values, packing, scores=scores)
    if (scores.softcap is not None or scores.window is not None) and flex_takes(queries):
        mixed = flex_ruled(queries, keys, values, _rule(queries, scores), packing=packing)
        return mixed.transpose(1, 2).flatten(2)
    return _sample_by_sample(queries, keys, values, packing, scores)


def flash_packed(queries: Tensor, keys: Tensor, values: Tensor, packing: Packing, *, scores: Scores = PLAIN) -> Tensor:
    """The same for packed rows in one kernel, which is told where samples begin (FlashAttention-2, arXiv 2307.08691).

    It takes float16 and bfloat16 on a GPU from the Ampere generation on, and needs torch 2.10; later versions take a
    window and a scale. It has no cap.
    """
    # Older versions of torch have no such module.
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    # [B, H, T, D] -> [B * T, H, D], which is how the projections made them: no copy.
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (queries, keys, values))
    known = _arguments(varlen_attn)
    # It counts the positions before the query's own.
    back = -1 if scores.window is None else scores.window - 1
    settings: dict[str, Any] = {"window_size": (back, 0)} if "window_size" in known else {"is_causal": True}
    if scores.scale is not None:
        settings["scale"] = scores.scale
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
    n_queries, window = queries.shape[2], scores.window
    if window is not None and n_queries == 1:
        keys, values = (each[:, :, -window:] for each in (keys, values))
    n_keys = keys.shape[2]
    if window is not None and window >= n_keys:
        window = None
    if scores.softcap is None and window is None:
        mask = None
        if 1 < n_queries < n_keys:
            mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=queries.device).tril(n_keys - n_queries)
        mixed = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and n_queries > 1,
            scale=scores.scale,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
    else:
        mixed = ruled_attention(queries, keys, values, _rule(queries, scores._replace(window=window)))
    return mixed.to(dtype).transpose(1, 2).flatten(2)


def _rule(queries: Tensor, scores: Scores) -> Rule:
    scale = queries.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    return Rule(scores.window, scores.softcap, scale)


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


def _flash_takes(queries: Tensor, scores: Scores) -> bool:
    head_dim = queries.shape[-1]
    return (
        queries.is_cuda
        and queries.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(queries.device) >= (8, 0)
        and _torch_has_flash()
        and (scores.window is None or _flash_knows("window_size"))
        and (scores.scale is None or _flash_knows("scale"))
    )


@cache
def _torch_has_flash() -> bool:
    return find_spec("torch.nn.attention.varlen") is not None


def _flash_knows(setting: str) -> bool:
    # Older versions of torch have no such module.
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    return setting in _arguments(varlen_attn)


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    """What a function of torch takes, which differs between its versions."""
    return frozenset(inspect.signature(function).parameters)
