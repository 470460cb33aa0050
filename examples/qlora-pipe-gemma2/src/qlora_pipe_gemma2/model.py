"""Gemma 2 in plain torch (arXiv 2408.00118): what differs from the decoder that the LLaMA kind of families shares.

Each block normalises what attention and feed-forward give as well as what they take; norms keep their weights as the
distance from one; every other layer sees only a window; scores and logits are capped; the embedding is scaled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from qlora_pipe.nn.attention import Scores
from qlora_pipe.nn.cache import Cache
from qlora_pipe.nn.decoder import Attention, DecoderConfig, DecoderModel, Told
from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.mlp import GatedMLP, gate_from
from qlora_pipe.nn.norm import RMSNorm
from qlora_pipe.nn.packing import Packing
from qlora_pipe.nn.sizes import MOST_POSITIONS, Sizes

_SLIDING, _FULL = "sliding_attention", "full_attention"
_MOST = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma2Config(DecoderConfig):
    """All that the computation depends on."""

    head_softcap: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json; ConfigError names a field that is missing, absurd, or asks for what isn't built here.

        The defaults of absent fields are the format's own.
        """
        config = Fields({"num_key_value_heads": 4, **values})
        if config.flag("use_bidirectional_attention", default=False):
            raise config.error("use_bidirectional_attention", "false: a position sees only those before it here")
        sizes, bias = Sizes.read(config, head_dim=256), config.flag("attention_bias", default=False)
        eps = config.number("rms_norm_eps", above=0, at_most=1, default=1e-6)
        return replace(
            cls.read(config, sizes, positions=8192),
            norm=partial(RMSNorm, eps=eps, unit_offset=True),
            gate=gate_from(config, "hidden_activation", default="gelu_pytorch_tanh"),
            scores=_scores_of_layers(config, sizes.layers),
            qkv_bias=bias,
            o_bias=bias,
            head_softcap=_softcap(config, "final_logit_softcapping", default=30.0),
        )


def _scores_of_layers(config: Fields, layers: int) -> tuple[Scores, ...]:
    scalar = config.number("query_pre_attn_scalar", above=0, at_most=_MOST, default=256)
    full = Scores(softcap=_softcap(config, "attn_logit_softcapping", default=50.0), scale=scalar**-0.5)
    sliding = full._replace(window=config.integer("sliding_window", most=MOST_POSITIONS, default=4096))
    kinds = [_FULL if layer % 2 else _SLIDING for layer in range(layers)]
    if config.has("layer_types"):
        kinds = config.choices("layer_types", (_SLIDING, _FULL), count=layers)
    return tuple(sliding if kind == _SLIDING else full for kind in kinds)


def _softcap(config: Fields, name: str, *, default: float) -> float | None:
    """Read a cap: null turns it off, and does not mean the same as absent."""
    if name in config.values and not config.has(name):
        return None
    return config.number(name, above=0, at_most=_MOST, default=default)


class Layer(nn.Module):
    """One block: attention and feed-forward, normalised before and after, each added to where it came from."""

    def __init__(self, config: Gemma2Config, *, layer: int) -> None:
        super().__init__()
        hidden, intermediate = config.sizes.hidden, config.sizes.intermediate
        self.input_layernorm = config.norm(hidden)
        self.self_attn = Attention(config, layer=layer)
        self.post_attention_layernorm = config.norm(hidden)
        self.pre_feedforward_layernorm = config.norm(hidden)
        self.mlp = GatedMLP(hidden, intermediate, gate=config.gate)
        self.post_feedforward_layernorm = config.norm(hidden)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        attended = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), told))
        x, normed = self.pre_feedforward_layernorm.after_adding(x, attended)
        after: Tensor = x + self.post_feedforward_layernorm(self.mlp(normed))
        return after


class Gemma2(DecoderModel):
    """A causal language model. A tied head is tied by whoever fills the parameters, as `ties` says."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config, blocks=[Layer(config, layer=layer) for layer in range(config.sizes.layers)])
        self.softcap = config.head_softcap

    def embed(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> tuple[Tensor, Told]:
        """Ids [B, T] -> [B, T, D], scaled by sqrt(D)."""
        state, told = super().embed(ids, cache=cache, packing=packing)
        # Rounded to the model's type first, as the checkpoints were trained.
        return state * float(torch.tensor(state.shape[-1] ** 0.5, dtype=state.dtype, device="cpu")), told

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> capped logits [..., vocabulary]."""
        logits = super().head(hidden)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @property
    def head_softcap(self) -> float | None:
        """What the head caps its logits with; knowing it, training never holds all of them."""
        return self.softcap
