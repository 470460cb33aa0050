"""The decoder that the LLaMA kind of families shares, parameters named as in their checkpoints.

Shapes: B sequences of T tokens, D components of the hidden state, H heads of which each KV group shares its keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from qlora_kernels.rotary import rotate
from qlora_pipe.nn.attention import PLAIN, Scores, causal_attention
from qlora_pipe.nn.cache import Cache, KVCache
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.linear import frozen_weight, project
from qlora_pipe.nn.mlp import Gate, GatedMLP, gate_from
from qlora_pipe.nn.norm import RMSNorm, rms_norm_from
from qlora_pipe.nn.packing import Packing
from qlora_pipe.nn.rotary import Rotary, rotary_from
from qlora_pipe.nn.sizes import Sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """All that the computation depends on."""

    sizes: Sizes
    rotary: Rotary
    norm: Callable[[int], RMSNorm]
    """Makes a norm of so many components."""
    gate: Gate
    scores: tuple[Scores, ...]
    """How each layer's attention makes its scores."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    """Whether each head's queries and keys are normalised before they are turned (arXiv 2302.05442)."""

    @classmethod
    def read(cls, config: Fields, sizes: Sizes, *, positions: int = 2048) -> Self:
        """Read what all families of this kind say in the same words: no biases, windows, or norms of heads are assumed.

        `positions` is the context of a config that says nothing of it. ConfigError names a field that is absurd.
        """
        return cls(
            sizes=sizes,
            rotary=rotary_from(config, head_dim=sizes.head_dim, positions=positions),
            norm=rms_norm_from(config),
            gate=gate_from(config),
            scores=(PLAIN,) * sizes.layers,
        )


class Told(NamedTuple):
    """What every block is told besides the state."""

    cosines: Tensor
    """[T, head_dim], or [B, T, head_dim] where rows are packed."""
    sines: Tensor
    cache: Cache | None
    packing: Packing | None


class Attention(nn.Module):
    """Causal self-attention with rotary positions; KV heads may be fewer than heads (arXiv 2305.13245)."""

    def __init__(self, config: DecoderConfig, *, layer: int) -> None:
        super().__init__()
        sizes = config.sizes
        self.layer, self.head_dim, self.scores = layer, sizes.head_dim, config.scores[layer]
        q_size, kv_size = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(sizes.hidden, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(sizes.hidden, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, sizes.hidden, bias=config.o_bias)
        self.q_norm = config.norm(sizes.head_dim) if config.head_norms else None
        self.k_norm = config.norm(sizes.head_dim) if config.head_norms else None

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a cache, attention reaches the tokens it holds too."""
        # [B, T, H * head_dim] -> [B, T, H, head_dim]
        q, k, v = (
            part.view(*part.shape[:-1], -1, self.head_dim) for part in project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # And then [B, H, T, head_dim].
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if told.cache is None:
            # Nobody else reads what was just projected or normalised.
            q, k = (rotate(part, told.cosines, told.sines, inplace=True) for part in (q, k))
            mixed = causal_attention(q, k, v, packing=told.packing, scores=self.scores)
        else:
            mixed = told.cache.attend(self.layer, q, k, v, cosines=told.cosines, sines=told.sines, scores=self.scores)
        projected: Tensor = self.o_proj(mixed)
        return projected


class Block(nn.Module):
    """Attention and feed-forward, each added to its normalised input's source."""

    def __init__(self, config: DecoderConfig, *, layer: int) -> None:
        super().__init__()
        sizes = config.sizes
        self.input_layernorm = config.norm(sizes.hidden)
        self.self_attn = Attention(config, layer=layer)
        self.post_attention_layernorm = config.norm(sizes.hidden)
        self.mlp = GatedMLP(sizes.hidden, sizes.intermediate, gate=config.gate, bias=config.mlp_bias)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x, normed = self.post_attention_layernorm.after_adding(x, self.self_attn(self.input_layernorm(x), told))
        after: Tensor = x + self.mlp(normed)
        return after


class Decoder(nn.Module):
    """Embedding, blocks and the final norm, as checkpoints name them."""

    def __init__(self, config: DecoderConfig, *, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.sizes.vocabulary, config.sizes.hidden)
        self.layers = nn.ModuleList(blocks)
        self.norm = config.norm(config.sizes.hidden)


class DecoderModel(CausalModel):
    """A causal language model. A tied head is tied by whoever fills the parameters, as `ties` says.

    A family whose blocks are others than `Block` gives its own, one for each layer; they are called with the state and
    what they are `Told`.
    """

    def __init__(self, config: DecoderConfig, *, blocks: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        if blocks is None:
            blocks = [Block(config, layer=layer) for layer in range(config.sizes.layers)]
        self.model = Decoder(config, blocks=blocks)
        self.lm_head = nn.Linear(config.sizes.hidden, config.sizes.vocabulary, bias=False)

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
            layers=self.config.sizes.layers,
            batch=batch,
            kv_heads=self.config.sizes.kv_heads,
            capacity=capacity,
            head_dim=self.config.sizes.head_dim,
            dtype=embedding.dtype,
            device=embedding.device,
        )
