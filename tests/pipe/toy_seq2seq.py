"""A small encoder-decoder model with caches of its own, to generate with where no family's modules should matter."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_pipe.nn.language import Inputs
from qlora_pipe.nn.seq2seq import Seq2SeqModel

WIDTH = 24
LONGEST = 64


class Attention(nn.Module):
    """One head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ keys.mT
        weights = (scores / WIDTH**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        mixed: Tensor = weights @ values
        return mixed


class Block(nn.Module):
    """Attention to one's own side, in the decoder to the other side too, and a linear layer."""

    def __init__(self, *, crosses: bool) -> None:
        super().__init__()
        self.own, self.other = Attention(), Attention() if crosses else None
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: Tensor, told: Any) -> Tensor:
        raise AssertionError("this model is not trained")


class ToyCache:
    """Keys and values of one layer: of the target [B, T, WIDTH] as far as it is read, and of the source."""

    def __init__(self, source: tuple[Tensor, Tensor], there: Tensor, *, capacity: int) -> None:
        self.source, self.there, self.capacity, self.length = source, there, capacity, 0
        self.target = [source[0].new_zeros(len(there), 0, WIDTH) for _ in range(2)]

    def add(self, *parts: Tensor) -> None:
        self.target = [torch.cat(pair, 1) for pair in zip(self.target, parts, strict=True)]
        self.length += parts[0].shape[1]
        assert self.length <= self.capacity, "more is stored than was asked for"

    def reorder(self, rows: Tensor) -> None:
        assert len(rows) == len(self.there)
        self.target = [part[rows] for part in self.target]
        self.source, self.there = (self.source[0][rows], self.source[1][rows]), self.there[rows]


class Sizes(NamedTuple):
    vocabulary: int = 23
    start_id: int = 0


class ToySeq2Seq(Seq2SeqModel):
    """An encoder of one block and a decoder of one, float64, with weights drawn from a seed."""

    def __init__(self, sizes: Sizes = Sizes(), *, seed: int = 0) -> None:  # noqa: B008
        super().__init__()
        self.sizes, self.encoded = sizes, 0
        self.embedding = nn.Embedding(sizes.vocabulary, WIDTH)
        self.places = nn.Embedding(LONGEST, WIDTH)
        self.encoder, self.decoder = Block(crosses=False), Block(crosses=True)
        self.lm_head = nn.Linear(WIDTH, sizes.vocabulary, bias=False)
        draws = torch.Generator().manual_seed(seed)
        self.double().eval().requires_grad_(False)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64) * WIDTH**-0.5 * 3)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [self.encoder, self.decoder]

    @property
    def start_id(self) -> int:
        return self.sizes.start_id

    def begin(self, inputs: Inputs) -> tuple[Tensor, Any]:
        raise AssertionError("this model is not trained")

    def finish(self, state: Any) -> Tensor:
        raise AssertionError("this model is not trained")

    def head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits

    def encode(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        self.encoded += 1
        state, own = self._embedded(source, start=0), self.encoder.own
        mixed = own(state, own.k(state), own.v(state), self._there(source.shape[1], source_lengths))
        return self._after(self.encoder, state + mixed)

    def new_cache(self, memory: Tensor, source_lengths: Tensor, *, capacity: int) -> ToyCache:
        other = self.decoder.other
        assert other is not None
        there = self._there(memory.shape[1], source_lengths)
        return ToyCache((other.k(memory), other.v(memory)), there, capacity=capacity)

    def decode(self, ids: Tensor, *, cache: ToyCache) -> Tensor:  # type: ignore[override]
        start, own, other = cache.length, self.decoder.own, self.decoder.other
        assert other is not None
        state = self._embedded(ids, start=start)
        cache.add(own.k(state), own.v(state))
        causal = torch.ones(ids.shape[1], cache.length, dtype=torch.bool, device=ids.device).tril(start)
        state = state + own(state, *cache.target, causal)
        return self._after(self.decoder, state + other(state, *cache.source, cache.there))

    def _embedded(self, ids: Tensor, *, start: int) -> Tensor:
        places: Tensor = self.places(torch.arange(start, start + ids.shape[1], device=ids.device))
        embedded: Tensor = self.embedding(ids) + places
        return embedded

    @staticmethod
    def _there(count: int, lengths: Tensor) -> Tensor:
        return (torch.arange(count, device=lengths.device) < lengths[:, None])[:, None]

    @staticmethod
    def _after(block: Block, state: Tensor) -> Tensor:
        return functional.layer_norm(state + torch.tanh(block.mlp(state)), [WIDTH])
