"""Gemma 2 in plain torch (arXiv 2408.00118), parameters named as in the checkpoint.

Where it differs from LLaMA: each block normalises what attention and feed-forward give as well as what they take; norms
keep their weights as the distance from one; every other layer sees only a window; scores and logits are capped; the
embedding is scaled.

Shapes: B sequences of T tokens, D components of the hidden state, H heads of which each KV group shares its keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from qlora_kernels.gated import geglu
from qlora_kernels.rotary import rotate
from qlora_pipe.nn.attention import Scores, causal_attention
from qlora_pipe.nn.cache import Cache, KVCache
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.linear import frozen_weight, project
from qlora_pipe.nn.norm import RMSNorm
from qlora_pipe.nn.packing import Packing
from qlora_pipe.nn.rotary import Rotary, rotary_from

# Each of a gate and what it lets through; the projections' outputs are nobody else's, so backward may take their place.
_ACTIVATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu_pytorch_tanh": partial(geglu, approximate="tanh", inplace=True),
    "gelu": partial(geglu, inplace=True),
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_MOST = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma2Config:
    """The fields of config.json that the computation depends on."""

    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    attention_bias: bool
    scores: tuple[Scores, ...]
    """How each layer's attention makes its scores."""
    head_softcap: float | None
    rotary: Rotary

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Check a config.json; ConfigError names a field that is missing, absurd, or asks for what isn't built here.

        The defaults of absent fields are the format's own.
        """
        config = Fields({"max_position_embeddings": 8192, **values})
        heads = config.integer("num_attention_heads", most=2**16)
        kv_heads = config.integer("num_key_value_heads", most=heads, default=min(4, heads))
        if heads % kv_heads:
            raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}")
        head_dim = config.integer("head_dim", most=2**16, default=256)
        if head_dim % 2:
            raise config.error("head_dim", "even, as rotary embeddings turn pairs")
        if config.flag("use_bidirectional_attention", default=False):
            raise config.error("use_bidirectional_attention", "false: a position sees only those before it here")
        return cls(
            vocabulary=config.integer("vocab_size", most=2**26),
            hidden=config.integer("hidden_size", most=2**20),
            intermediate=config.integer("intermediate_size", most=2**23),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            activation=config.choice("hidden_activation", _ACTIVATIONS.keys(), default="gelu_pytorch_tanh"),
            norm_eps=config.number("rms_norm_eps", above=0, at_most=1, default=1e-6),
            attention_bias=config.flag("attention_bias", default=False),
            scores=_scores_of_layers(config),
            head_softcap=_softcap(config, "final_logit_softcapping", default=30.0),
            rotary=rotary_from(config, head_dim=head_dim),
        )


def _scores_of_layers(config: Fields) -> tuple[Scores, ...]:
    layers = config.integer("num_hidden_layers", most=2**12)
    scalar = config.number("query_pre_attn_scalar", above=0, at_most=_MOST, default=256)
    softcap = _softcap(config, "attn_logit_softcapping", default=50.0)
    full = Scores(softcap=softcap, scale=scalar**-0.5)
    sliding = full._replace(window=config.integer("sliding_window", most=2**30, default=4096))
    kinds = config.values.get("layer_types")
    if kinds is None:
        kinds = [_FULL if layer % 2 else _SLIDING for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in (_SLIDING, _FULL) for kind in kinds):
        raise config.error("layer_types", f"a list of {layers} times {_SLIDING} or {_FULL}")
    return tuple(sliding if kind == _SLIDING else full for kind in kinds)


def _softcap(config: Fields, name: str, *, default: float) -> float | None:
    """Read a cap: null turns it off, and does not mean the same as absent."""
    if name in config.values and not config.has(name):
        return None
    return config.number(name, above=0, at_most=_MOST, default=default)


class Told(NamedTuple):
    """What every block is told besides the state."""

    cosines: Tensor
    """[T, head_dim], or [B, T, head_dim] where rows are packed."""
    sines: Tensor
    cache: Cache | None
    packing: Packing | None


class Attention(nn.Module):
    """Causal self-attention with rotary positions, capped scores and, in every other layer, a window."""

    def __init__(self, config: Gemma2Config, *, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.scores = layer, config.head_dim, config.scores[layer]
        q_size, kv_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden, bias=config.attention_bias)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a cache, attention reaches the tokens it holds too."""
        # [B, T, H * head_dim] -> [B, H, T, head_dim]
        q, k, v = (
            part.view(*part.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for part in project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if told.cache is None:
            # Nobody else reads what was just projected.
            q, k = (rotate(part, told.cosines, told.sines, inplace=True) for part in (q, k))
            mixed = causal_attention(q, k, v, packing=told.packing, scores=self.scores)
        else:
            turns = {"cosines": told.cosines, "sines": told.sines}
            mixed = told.cache.attend(self.layer, q, k, v, **turns, scores=self.scores)
        projected: Tensor = self.o_proj(mixed)
        return projected


class MLP(nn.Module):
    """The gated feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        gated: Tensor = self.down_proj(self.activation(gate, up))
        return gated


class Layer(nn.Module):
    """One block: attention and feed-forward, normalised before and after, each added to where it came from."""

    def __init__(self, config: Gemma2Config, *, layer: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden, eps=config.norm_eps, unit_offset=True)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer=layer)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        attended = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), told))
        x, normed = self.pre_feedforward_layernorm.after_adding(x, attended)
        after: Tensor = x + self.post_feedforward_layernorm(self.mlp(normed))
        return after


class Decoder(nn.Module):
    """Embedding, blocks and the final norm, as checkpoints name them."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config, layer=layer) for layer in range(len(config.scores)))
        self.norm = RMSNorm(config.hidden, eps=config.norm_eps, unit_offset=True)


class Gemma2(CausalModel):
    """A causal language model. A tied head is tied by whoever fills the parameters, as `ties` says."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the config vouches for."""
        return self.config.rotary.context

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers."""
        return cast(Sequence[nn.Module], self.model.layers)

    def embed(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> tuple[Tensor, Told]:
        """Ids [B, T] -> [B, T, D]; a cache's tokens come before them, and a packing says where samples begin."""
        state: Tensor = self.model.embed_tokens(ids)
        # Rounded to the model's type first, as the checkpoints were trained.
        state = state * float(torch.tensor(self.config.hidden**0.5, dtype=state.dtype, device="cpu"))
        rotary, count = self.config.rotary, ids.shape[1]
        if packing is not None:
            assert cache is None, "packed rows are for training, and have no cache"
            tables = rotary.packed_tables(packing, like=state)
        elif cache is not None:
            tables = cache.turns(rotary, count, like=state)
        else:
            tables = rotary.tables(torch.arange(count, device=state.device), length=count, like=state)
        return state, Told(*tables, cache, packing)

    def finish(self, state: Tensor) -> Tensor:
        """The last norm."""
        hidden: Tensor = self.model.norm(state)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> capped logits [..., vocabulary]."""
        logits: Tensor = self.lm_head(hidden)
        softcap = self.head_softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    @property
    def head_weight(self) -> Tensor | None:
        """The head's matrix; with the cap below, training need never hold all logits."""
        return frozen_weight(self.lm_head)

    @property
    def head_softcap(self) -> float | None:
        """What the head caps its logits with."""
        return self.config.head_softcap

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache for `batch` sequences of up to `capacity` tokens, in the model's type, on its device."""
        embedding = self.model.embed_tokens.weight
        return KVCache(
            layers=len(self.config.scores),
            batch=batch,
            kv_heads=self.config.kv_heads,
            capacity=capacity,
            head_dim=self.config.head_dim,
            dtype=embedding.dtype,
            device=embedding.device,
        )
