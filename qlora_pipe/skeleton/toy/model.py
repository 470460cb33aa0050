"""The toy family in plain torch: each block is attention alone. Parameters are named as in the checkpoint.

Shapes: B sequences of T tokens, D components of the hidden state, H heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from qlora_kernels import rotate
from qlora_pipe.nn.attention import causal_attention
from qlora_pipe.nn.cache import Cache, KVCache
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.linear import project
from qlora_pipe.nn.norm import RMSNorm
from qlora_pipe.nn.packing import Packing
from qlora_pipe.nn.rotary import Rotary, rotary_from


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig:
    """The fields of config.json that the computation depends on."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    rotary: Rotary

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Check a config.json; ConfigError names a field that is missing or absurd."""
        config = Fields(values)
        hidden = config.integer("hidden_size", most=2**20)
        heads = config.integer("num_attention_heads", most=2**16)
        if hidden % (2 * heads):
            raise config.error("hidden_size", f"a multiple of twice num_attention_heads, which is {heads}")
        return cls(
            vocabulary=config.integer("vocab_size", most=2**26),
            hidden=hidden,
            layers=config.integer("num_hidden_layers", most=2**12),
            heads=heads,
            rotary=rotary_from(config, head_dim=hidden // heads),
        )


class Told(NamedTuple):
    """What every block is told besides the state."""

    cosines: Tensor
    sines: Tensor
    cache: Cache | None
    packing: Packing | None


class Block(nn.Module):
    """Causal self-attention, added to what it reads."""

    def __init__(self, config: ToyConfig, *, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.hidden // config.heads
        self.norm = RMSNorm(config.hidden, eps=1e-6)
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        # [B, T, D] -> [B, H, T, D / H]
        q, k, v = (
            part.view(*part.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for part in project(self.norm(x), self.q_proj, self.k_proj, self.v_proj)
        )
        if told.cache is None:
            q, k = (rotate(part, told.cosines, told.sines) for part in (q, k))
            mixed = causal_attention(q, k, v, packing=told.packing)
        else:
            mixed = told.cache.attend(self.layer, q, k, v, cosines=told.cosines, sines=told.sines)
        after: Tensor = x + self.o_proj(mixed)
        return after


class Toy(CausalModel):
    """A causal language model."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config, layer=layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden, eps=1e-6)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the config vouches for."""
        return self.config.rotary.context

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers."""
        return cast(Sequence[nn.Module], self.layers)

    def embed(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> tuple[Tensor, Told]:
        """Ids [B, T] -> [B, T, D]; a cache's tokens come before them, and a packing says where samples begin."""
        state: Tensor = self.embed_tokens(ids)
        rotary, count = self.config.rotary, ids.shape[1]
        if packing is not None:
            tables = rotary.packed_tables(packing, like=state)
        elif cache is not None:
            tables = cache.turns(rotary, count, like=state)
        else:
            tables = rotary.tables(torch.arange(count, device=state.device), length=count, like=state)
        return state, Told(*tables, cache, packing)

    def finish(self, state: Tensor) -> Tensor:
        """The last norm."""
        hidden: Tensor = self.norm(state)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., vocabulary]."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache for `batch` sequences of up to `capacity` tokens, in the model's type, on its device."""
        embedding = self.embed_tokens.weight
        return KVCache(
            layers=self.config.layers,
            batch=batch,
            kv_heads=self.config.heads,
            capacity=capacity,
            head_dim=self.config.hidden // self.config.heads,
            dtype=embedding.dtype,
            device=embedding.device,
        )
