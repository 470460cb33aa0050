"""The other side of a comparison: the model of transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Gemma2ForCausalLM
from transformers.masking_utils import eager_mask


def theirs(folder: Path, dtype: torch.dtype) -> Any:
    """The model of transformers; in float64 with an attention that is in float64, too, where its own is in float32."""
    attention = "all_float64" if dtype == torch.float64 else "eager"
    return Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).requires_grad_(False)


def _all_float64(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    **_: Any,
) -> tuple[Tensor, None]:
    shared = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(shared, dim=1).mT * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = (scores + attention_mask).softmax(-1)
    assert weights.dtype == torch.float64
    return (weights @ value.repeat_interleave(shared, dim=1)).transpose(1, 2), None


AttentionInterface.register("all_float64", _all_float64)
AttentionMaskInterface.register("all_float64", eager_mask)
