"""An encoder-decoder toy: a target sees the mean of its source and the mean of what stands before it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pipe.architecture import Architecture
from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.language import Inputs
from qlora_pipe.nn.seq2seq import Seq2SeqModel


class Cache:
    """The mean of the source and the sum over the target, of each row."""

    def __init__(self, source: Tensor) -> None:
        self.source, self.sum = source, torch.zeros_like(source)
        self.length = 0

    def reorder(self, rows: Tensor) -> None:
        self.source, self.sum = self.source[rows], self.sum[rows]


class Encoder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.mix_proj = nn.Linear(size, size, bias=False)

    def forward(self, state: tuple[Tensor, Tensor], lengths: Tensor) -> tuple[Tensor, Tensor]:
        source, target = state
        return source + torch.tanh(self.mix_proj(source)), target


class Decoder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.source_proj = nn.Linear(size, size, bias=False)
        self.target_proj = nn.Linear(size, size, bias=False)

    def step(self, target: Tensor, source: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
        return target + self.source_proj(source)[:, None] + self.target_proj(sums / counts[:, None])

    def forward(self, state: tuple[Tensor, Tensor], lengths: Tensor) -> tuple[Tensor, Tensor]:
        source, target = state
        counts = torch.arange(1, target.shape[1] + 1)
        return source, self.step(target, mean_of(source, lengths), target.cumsum(1), counts)


def mean_of(source: Tensor, lengths: Tensor) -> Tensor:
    """[B, S, D] -> [B, D], without the padding."""
    is_text = torch.arange(source.shape[1]) < lengths[:, None]
    return (source * is_text[..., None]).sum(1) / lengths[:, None]


class Pair(Seq2SeqModel):
    """The model."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fields = Fields(config)
        size, vocabulary = fields.integer("hidden_size", most=1024), fields.integer("vocab_size", most=1024)
        self.shared = nn.Embedding(vocabulary, size)
        self.encoder, self.decoder = Encoder(size), Decoder(size)
        self.lm_head = nn.Linear(size, vocabulary, bias=False)

    @property
    def start_id(self) -> int:
        return 0

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [self.encoder, self.decoder]

    def begin(self, inputs: Inputs) -> tuple[tuple[Tensor, Tensor], Tensor]:
        assert inputs.source is not None
        assert inputs.source_lengths is not None
        return (self.shared(inputs.source), self.shared(inputs.ids)), inputs.source_lengths

    def finish(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return state[1]

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def encode(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        embedded = self.shared(source)
        return self.encoder((embedded, embedded), source_lengths)[0]

    def new_cache(self, memory: Tensor, source_lengths: Tensor, *, capacity: int) -> Cache:
        return Cache(mean_of(memory, source_lengths))

    def decode(self, ids: Tensor, *, cache: Cache) -> Tensor:  # type: ignore[override]
        target = self.shared(ids)
        sums = cache.sum[:, None] + target.cumsum(1)
        counts = torch.arange(cache.length + 1, cache.length + ids.shape[1] + 1)
        cache.sum, cache.length = sums[:, -1], cache.length + ids.shape[1]
        return self.decoder.step(target, cache.source, sums, counts)


PAIR = Architecture(
    name="pair",
    model_types=("pair",),
    kind="seq2seq",
    task_type="SEQ_2_SEQ_LM",
    build=Pair,
    blocks=("encoder", "decoder"),
    quantize=("*coder.*_proj.weight",),
    keep_16bit=("lm_head",),
    adapt=("*coder.*_proj",),
    tiny={"model_type": "pair", "hidden_size": 32, "vocab_size": 280, "eos_token_id": 1, "pad_token_id": 0},
)
