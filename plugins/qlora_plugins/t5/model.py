"""T5 in plain torch (arXiv 1910.10683, 2002.05202, 2010.11934, 2304.09151), parameters named as in the checkpoint.

Shapes: B pairs of S source and T target tokens, D components of the hidden state, H heads; R distances between
positions, as nn/relative_bias.py counts them.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from qlora_pipe.nn.language import Inputs
from qlora_pipe.nn.linear import frozen_weight, project
from qlora_pipe.nn.norm import RMSNorm
from qlora_pipe.nn.relative_bias import bias_by_distance, biased_attention, t5_bucket
from qlora_pipe.nn.seq2seq import DecoderCache, KeysAndValues, Seq2SeqCache, Seq2SeqModel
from qlora_plugins.t5.activations import ACTIVATIONS, gated
from qlora_plugins.t5.config import T5Config

State = tuple[Tensor, Tensor]
"""The source's hidden states [B, S, D], normalised by the encoder's last block, and the target's [B, T, D]."""


class Told(NamedTuple):
    """What every block is told besides the state."""

    encoder_biases: Sequence[Tensor]
    """Per layer [H, R]: one and the same for all, or each its own."""
    decoder_biases: Sequence[Tensor]
    source_lengths: Tensor
    closing: nn.Module
    """The norm that ends the encoder: its last block applies it."""
    cache: DecoderCache | None = None


class Norm(RMSNorm):
    """The norm of all these models.

    In float64 only the mean square is taken in float32, as in the models that checkpoints are compared with.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if x.dtype != torch.float64:
            return super().forward(x)
        mean_square = x.float().square().mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean_square + self.eps))

    def after_adding(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Give x + delta, and the norm of that."""
        if x.dtype != torch.float64:
            return super().after_adding(x, delta)
        total = x + delta
        return total, self(total)


class Attention(nn.Module):
    """The projections that both kinds of attention have. Scores are not scaled: the first values of q were."""

    def __init__(self, config: T5Config, *, number: int) -> None:
        super().__init__()
        self.number, self.head_dim = number, config.head_dim
        inner = config.heads * config.head_dim
        self.q = nn.Linear(config.hidden, inner, bias=False)
        self.k = nn.Linear(config.hidden, inner, bias=False)
        self.v = nn.Linear(config.hidden, inner, bias=False)
        self.o = nn.Linear(inner, config.hidden, bias=False)

    def heads(self, projected: Iterable[Tensor]) -> list[Tensor]:
        """[B, T, H * head_dim] -> [B, H, T, head_dim], each."""
        return [part.view(*part.shape[:-1], -1, self.head_dim).transpose(1, 2) for part in projected]


class SelfAttention(Attention):
    """Attention among source or target tokens; `relative_attention_bias` where the layer has a table of its own."""

    def __init__(self, config: T5Config, *, number: int) -> None:
        super().__init__(config, number=number)
        if number == 0 or config.table_per_layer:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def forward(
        self, x: Tensor, *, bias: Tensor, lengths: Tensor | None = None, cache: DecoderCache | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]: to all of the first `lengths` tokens or, without, to those up to each token's own."""
        q, k, v = self.heads(project(x, self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.of_target(self.number, k, v)
        mixed = biased_attention(q, k, v, bias=bias, causal=lengths is None, scale=1.0, key_lengths=lengths)
        return project(mixed, self.o)[0]


class CrossAttention(Attention):
    """Attention from target to source tokens, whose distance means nothing."""

    def forward(self, x: Tensor, memory: Tensor, *, lengths: Tensor, cache: DecoderCache | None) -> Tensor:
        """x [B, T, D] and the encoder's output [B, S, D], `lengths` of which are no padding -> [B, T, D]."""
        (q,) = self.heads(project(x, self.q))
        k, v = self.of_source(memory) if cache is None else cache.of_source(self.number, self.of_source)
        mixed = biased_attention(q, k, v, bias=None, causal=False, scale=1.0, key_lengths=lengths)
        return project(mixed, self.o)[0]

    def of_source(self, memory: Tensor) -> KeysAndValues:
        """Keys and values [B, H, S, head_dim] of the encoder's output."""
        k, v = self.heads(project(memory, self.k, self.v))
        return k, v


class FeedForward(nn.Module):
    """The feed-forward layer: with one matrix into the inner width or, gated, with two."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated, self.activation = config.gated, config.activation
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            self.add_module(name, nn.Linear(config.hidden, config.inner, bias=False))
        self.wo = nn.Linear(config.inner, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.gated:
            gate, up = project(x, cast(nn.Module, self.wi_0), cast(nn.Module, self.wi_1))
            inner = gated(gate, up, activation=self.activation)
        else:
            inner = ACTIVATIONS[self.activation](project(x, cast(nn.Module, self.wi))[0])
        return project(inner, self.wo)[0]


class Sublayer(nn.Module):
    """What checkpoints call a layer: a norm, and what reads its output, under a name of its own."""

    def __init__(self, config: T5Config, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, inner)
        self.layer_norm = Norm(config.hidden, eps=config.norm_eps)

    @property
    def inner(self) -> nn.Module:
        """The module that reads what was normalised."""
        return self.get_submodule(self.name)


class EncoderBlock(nn.Module):
    """A block of the encoder, whose last one also applies the encoder's norm."""

    def __init__(self, config: T5Config, *, number: int) -> None:
        super().__init__()
        self.number, self.is_last = number, number == config.encoder_layers - 1
        self.layer = nn.ModuleList(
            [
                Sublayer(config, "SelfAttention", SelfAttention(config, number=number)),
                Sublayer(config, "DenseReluDense", FeedForward(config)),
            ]
        )

    def forward(self, state: State, told: Told) -> State:
        """Move the source's states on."""
        source, target = state
        attention, feed_forward = cast(Sequence[Sublayer], self.layer)
        mixed = attention.inner(
            attention.layer_norm(source), bias=told.encoder_biases[self.number], lengths=told.source_lengths
        )
        source, normed = feed_forward.layer_norm.after_adding(source, mixed)
        source = source + feed_forward.inner(normed)
        return told.closing(source) if self.is_last else source, target


class DecoderBlock(nn.Module):
    """A block of the decoder."""

    def __init__(self, config: T5Config, *, number: int) -> None:
        super().__init__()
        self.number = number
        self.layer = nn.ModuleList(
            [
                Sublayer(config, "SelfAttention", SelfAttention(config, number=number)),
                Sublayer(config, "EncDecAttention", CrossAttention(config, number=number)),
                Sublayer(config, "DenseReluDense", FeedForward(config)),
            ]
        )

    def forward(self, state: State, told: Told) -> State:
        """Move the target's states on."""
        memory, target = state
        attention, cross, feed_forward = cast(Sequence[Sublayer], self.layer)
        mixed = attention.inner(attention.layer_norm(target), bias=told.decoder_biases[self.number], cache=told.cache)
        target, normed = cross.layer_norm.after_adding(target, mixed)
        mixed = cross.inner(normed, memory, lengths=told.source_lengths, cache=told.cache)
        target, normed = feed_forward.layer_norm.after_adding(target, mixed)
        return memory, target + feed_forward.inner(normed)


class Stack(nn.Module):
    """Embedding, blocks and the final norm, as checkpoints name them."""

    def __init__(self, config: T5Config, blocks: Iterable[nn.Module], *, both_ways: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.block = nn.ModuleList(blocks)
        self.final_layer_norm = Norm(config.hidden, eps=config.norm_eps)
        self.bucket_of = partial(t5_bucket, buckets=config.buckets, farthest=config.farthest, both_ways=both_ways)
        self.table_per_layer = config.table_per_layer

    def biases(self, *, queries: int, keys: int) -> list[Tensor]:
        """The biases [H, R] of all layers; where the first one's table serves all, it is laid out once."""
        attentions = [cast(Sublayer, block.get_submodule("layer.0")).inner for block in self.block]
        found = [
            bias_by_distance(attention.relative_attention_bias.weight.T, self.bucket_of, queries=queries, keys=keys)
            for attention in cast(list[SelfAttention], attentions if self.table_per_layer else attentions[:1])
        ]
        return found if self.table_per_layer else found * len(self.block)


class T5(Seq2SeqModel):
    """An encoder-decoder model. Embeddings are tied by whoever fills the parameters, as `ties` says."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocabulary, config.hidden)
        encoder_blocks = (EncoderBlock(config, number=number) for number in range(config.encoder_layers))
        decoder_blocks = (DecoderBlock(config, number=number) for number in range(config.decoder_layers))
        self.encoder = Stack(config, encoder_blocks, both_ways=True)
        self.decoder = Stack(config, decoder_blocks, both_ways=False)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    @property
    def start_id(self) -> int:
        """The id that the decoder begins with."""
        return self.config.start_id

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the encoder, then those of the decoder."""
        return [*self.encoder.block, *self.decoder.block]

    def begin(self, inputs: Inputs) -> tuple[State, Told]:
        """Embed both sides of a batch, and lay out the biases of its lengths."""
        assert inputs.source is not None, "a batch for an encoder-decoder model has a source"
        assert inputs.source_lengths is not None, "a batch for an encoder-decoder model says how long its sources are"
        told = self._told(inputs.source, inputs.source_lengths)
        length = inputs.ids.shape[1]
        told = told._replace(decoder_biases=self.decoder.biases(queries=length, keys=length))
        return (self.shared(inputs.source), self.shared(inputs.ids)), told

    def finish(self, state: State) -> Tensor:
        """The decoder's last norm, and what the family multiplies its output by."""
        hidden: Tensor = self.decoder.final_layer_norm(state[1])
        return hidden if self.config.output_scale == 1.0 else hidden * self.config.output_scale

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., vocabulary]."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    @property
    def head_weight(self) -> Tensor | None:
        """The head's matrix."""
        return frozen_weight(self.lm_head)

    def encode(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        """Ids [B, S] and how many of each row are no padding [B] -> the encoder's hidden states [B, S, D]."""
        told = self._told(source, source_lengths)
        embedded: Tensor = self.shared(source)
        # The encoder leaves the target alone: one without tokens does.
        state = embedded, embedded[:, :0]
        for block in self.encoder.block:
            state = block(state, told)
        return state[0]

    def new_cache(self, memory: Tensor, source_lengths: Tensor, *, capacity: int) -> DecoderCache:
        """Make the cache for decoding up to `capacity` tokens over what `encode` gave."""
        return DecoderCache(
            memory,
            source_lengths,
            layers=self.config.decoder_layers,
            heads=self.config.heads,
            head_dim=self.config.head_dim,
            capacity=capacity,
        )

    def decode(self, ids: Tensor, *, cache: Seq2SeqCache) -> Tensor:
        """Ids [B, T] that go on from what the cache holds -> hidden states [B, T, D]; they are added to it."""
        assert isinstance(cache, DecoderCache), "the cache is another model's"
        count = ids.shape[1]
        biases = self.decoder.biases(queries=count, keys=cache.length + count)
        told = Told((), biases, cache.source_lengths, self.encoder.final_layer_norm, cache)
        state = cache.memory, cast(Tensor, self.shared(ids))
        for block in self.decoder.block:
            state = block(state, told)
        cache.advance(count)
        return self.finish(state)

    def _told(self, source: Tensor, source_lengths: Tensor) -> Told:
        length = source.shape[1]
        biases = self.encoder.biases(queries=length, keys=length)
        return Told(biases, (), source_lengths, self.encoder.final_layer_norm)
