"""Causal attention over queries that may have fewer keys and values than heads."""

import torch
from torch import Tensor
from torch.nn import functional


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from each position to itself and to those before it.

    queries [B, H, T, D]; keys and values [B, KV, S, D], H a multiple of KV: each key head serves H / KV query heads
    in a row (arXiv 2305.13245). The T queries are the last T of the S positions. Gives [B, T, H * D].
    """
    n_queries, n_keys = queries.shape[2], keys.shape[2]
    mask = None
    if 1 < n_queries < n_keys:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=queries.device).tril(n_keys - n_queries)
    mixed = functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=n_queries == n_keys and n_queries > 1,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return mixed.transpose(1, 2).flatten(2)
