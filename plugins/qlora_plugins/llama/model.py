"""LLaMA in plain torch (arXiv 2302.13971, 2307.09288, 2407.21783), parameters named as in the checkpoint.

Shapes: B sequences of T tokens, D components of the hidden state, H heads of which each KV group shares its keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_kernels.gated import geglu, swiglu
from qlora_kernels.rotary import rotate
from qlora_pipe.nn.attention import causal_attention
from qlora_pipe.nn.cache import Cache, KVCache
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.linear import frozen_weight, project
from qlora_pipe.nn.norm import RMSNorm
from qlora_pipe.nn.packing import Packing
from qlora_pipe.nn.rotary import Rotary, rotary_from

# Each of a gate and what it lets through; the projections' outputs are nobody else's, so backward may take their place.
_ACTIVATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": partial(swiglu, inplace=True),
    "gelu": partial(geglu, inplace=True),
    "gelu_pytorch_tanh": partial(geglu, approximate="tanh", inplace=True),
    "relu": lambda gate, up: functional.relu(gate) * up,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """The fields of config.json that the computation depends on."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    rotary: Rotary

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Check a config.json; ConfigError names a field that is missing, absurd, or asks for what isn't built here.

        The defaults of absent fields are the format's own. `pretraining_tp` only says how a product was once split,
        and `attention_dropout` belongs to a training recipe: neither changes what the model computes.
        """
        config = Fields(values)
        hidden = config.integer("hidden_size", most=2**20)
        heads = config.integer("num_attention_heads", most=2**16)
        kv_heads = config.integer("num_key_value_heads", most=heads, default=heads)
        if heads % kv_heads:
            raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}")
        if not config.has("head_dim") and hidden % heads:
            raise config.error("hidden_size", f"a multiple of num_attention_heads ({heads}), or head_dim be given")
        head_dim = config.integer("head_dim", most=2**16, default=hidden // heads)
        if head_dim % 2:
            raise config.error("head_dim", f"even, as rotary embeddings turn pairs (here it is {head_dim})")
        if config.has("sliding_window"):
            raise config.error("sliding_window", "absent: attention here reaches every earlier token")
        if config.number("partial_rotary_factor", default=1.0) != 1.0:
            raise config.error("partial_rotary_factor", "1: heads are turned as a whole")
        return cls(
            vocabulary=config.integer("vocab_size", most=2**26),
            hidden=hidden,
            intermediate=config.integer("intermediate_size", most=2**23),
            layers=config.integer("num_hidden_layers", most=2**12),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            activation=config.choice("hidden_act", _ACTIVATIONS.keys(), default="silu"),
            norm_eps=config.number("rms_norm_eps", above=0, at_most=1, default=1e-6),
            attention_bias=config.flag("attention_bias", default=False),
            mlp_bias=config.flag("mlp_bias", default=False),
            rotary=rotary_from(config, head_dim=head_dim),
        )


class Told(NamedTuple):
    """What every block is told besides the state."""

    cosines: Tensor
    """[T, head_dim], or [B, T, head_dim] where rows are packed."""
    sines: Tensor
    cache: Cache | None
    packing: Packing | None


class Attention(nn.Module):
    """Causal self-attention with rotary positions; KV heads may be fewer than heads."""

    def __init__(self, config: LlamaConfig, *, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
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
            mixed = causal_attention(q, k, v, packing=told.packing)
        else:
            mixed = told.cache.attend(self.layer, q, k, v, cosines=told.cosines, sines=told.sines)
        projected: Tensor = self.o_proj(mixed)
        return projected


class MLP(nn.Module):
    """The gated feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=config.mlp_bias)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        gated: Tensor = self.down_proj(self.activation(gate, up))
        return gated


class Layer(nn.Module):
    """One block: attention and feed-forward, each added to its normalised input's source."""

    def __init__(self, config: LlamaConfig, *, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = Attention(config, layer=layer)
        self.post_attention_layernorm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x, normed = self.post_attention_layernorm.after_adding(x, self.self_attn(self.input_layernorm(x), told))
        after: Tensor = x + self.mlp(normed)
        return after


class Decoder(nn.Module):
    """Embedding, blocks and the final norm, as checkpoints name them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config, layer=layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden, eps=config.norm_eps)


class Llama(CausalModel):
    """A causal language model. A tied head is tied by whoever fills the parameters, as `ties` says."""

    def __init__(self, config: LlamaConfig) -> None:
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
        """Hidden states [..., D] -> logits [..., vocabulary]."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    @property
    def head_weight(self) -> Tensor | None:
        """The head's matrix."""
        return frozen_weight(self.lm_head)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache for `batch` sequences of up to `capacity` tokens, in the model's type, on its device."""
        embedding = self.model.embed_tokens.weight
        return KVCache(
            layers=self.config.layers,
            batch=batch,
            kv_heads=self.config.kv_heads,
            capacity=capacity,
            head_dim=self.config.head_dim,
            dtype=embedding.dtype,
            device=embedding.device,
        )
