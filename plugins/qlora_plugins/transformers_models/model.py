"""A model of transformers, as training and generation ask for one: a single block, from ids to logits.

Nothing is known of its insides, so its layers are not cut into blocks of ours: it is trained as a whole, its own layers
compute themselves again in backward, and its logits are made in one piece.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from qlora_pipe.nn.cache import Cache
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.language import Inputs
from qlora_pipe.nn.linear import LoraLinear, QuantizedLinear
from qlora_pipe.nn.packing import Packing
from qlora_pipe.nn.seq2seq import Seq2SeqModel


def share_registry(face: nn.Module, inner: Any) -> None:
    """Let two modules be one: the same parameters, buffers and children under the same names."""
    face._parameters, face._buffers, face._modules = inner._parameters, inner._buffers, inner._modules
    face._non_persistent_buffers_set = inner._non_persistent_buffers_set
    if inner.supports_gradient_checkpointing:
        # The newer of its two names.
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def settle(inner: PreTrainedModel, device: torch.device) -> None:
    """Bring the buffers that no file holds to the device, once."""
    for part in inner.modules():
        if isinstance(part, LoraLinear | QuantizedLinear):
            continue
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.device != device:
                part._buffers[name] = buffer.to(device)


def context_of(inner: PreTrainedModel) -> int:
    """The longest sequence that the config vouches for."""
    config = inner.config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return 1 << 20


class TheirCache:
    """Keys and values as transformers keeps them."""

    def __init__(self, inner: Any, device: torch.device) -> None:
        self.inner = inner
        self.stored = torch.empty(0, device=device)

    def advance(self, positions: int) -> None:
        """Their layers have counted already."""

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] holds."""
        self.inner.reorder_cache(rows)


class Causal(CausalModel):
    """A causal model of transformers."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self._inner = (inner,)
        share_registry(self, inner)

    @property
    def context(self) -> int:
        """The longest sequence that the config vouches for."""
        return context_of(self._inner[0])

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The model as a whole."""
        return (self,)

    def embed(self, ids: Tensor, *, cache: Cache | None = None, packing: Packing | None = None) -> tuple[Tensor, Any]:
        """The ids [B, T, 1] are all that the one block reads."""
        assert packing is None, "rows of several samples are not for these models"
        return ids[..., None], cache

    def forward(self, ids: Tensor, told: Any = None, *, cache: Any = None) -> Tensor:
        """Ids [B, T], or [B, T, 1] where it is called as a block -> logits [B, T, vocabulary]."""
        theirs = cache if cache is not None else told
        settle(self._inner[0], ids.device)
        inner = self._inner[0]
        inner.training = self.training
        found = inner(
            input_ids=ids.view(ids.shape[:2]),
            past_key_values=None if theirs is None else theirs.inner,
            use_cache=theirs is not None,
        )
        logits: Tensor = found.logits
        return logits

    def finish(self, state: Tensor) -> Tensor:
        """Logits are ready."""
        return state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits are ready."""
        return hidden

    def new_cache(self, batch: int, capacity: int) -> Any:  # noqa: ARG002
        """Make an empty cache, which grows."""
        inner = self._inner[0]
        return TheirCache(DynamicCache(config=inner.config), inner.device)


class Seq2Seq(Seq2SeqModel):
    """An encoder-decoder model of transformers."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self._inner = (inner,)
        share_registry(self, inner)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The model as a whole."""
        return (self,)

    def begin(self, inputs: Inputs) -> tuple[Tensor, Inputs]:
        """The decoder's ids [B, T, 1] are the state, the source is told."""
        settle(self._inner[0], inputs.ids.device)
        return inputs.ids[..., None], inputs

    def forward(self, ids: Tensor, told: Inputs) -> Tensor:
        """Decoder ids [B, T, 1] -> logits [B, T, vocabulary]."""
        assert told.source is not None
        assert told.source_lengths is not None
        inner = self._inner[0]
        inner.training = self.training
        mask = reachable(told.source, told.source_lengths)
        logits: Tensor = inner(
            input_ids=told.source, attention_mask=mask, decoder_input_ids=ids[..., 0], use_cache=False
        ).logits
        return logits

    def finish(self, state: Tensor) -> Tensor:
        """Logits are ready."""
        return state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits are ready."""
        return hidden

    @property
    def start_id(self) -> int:
        """The id that the decoder begins with."""
        found: int = self._inner[0].config.decoder_start_token_id
        return found

    def encode(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        """Ids [B, S] -> the encoder's hidden states [B, S, D]."""
        inner = self._inner[0]
        settle(inner, source.device)
        inner.training = self.training
        memory: Tensor = inner.get_encoder()(
            input_ids=source, attention_mask=reachable(source, source_lengths)
        ).last_hidden_state
        return memory

    def new_cache(self, memory: Tensor, source_lengths: Tensor, *, capacity: int) -> "SourceCache":  # noqa: ARG002
        """Make an empty cache over what the encoder gave, which grows."""
        return SourceCache(memory, source_lengths)

    def decode(self, ids: Tensor, *, cache: Any) -> Tensor:
        """Ids [B, T] that go on from the cache -> logits [B, T, vocabulary]."""
        logits: Tensor = self._inner[0](
            encoder_outputs=BaseModelOutput(last_hidden_state=cache.memory),
            attention_mask=cache.mask,
            decoder_input_ids=ids,
            past_key_values=cache.inner,
            use_cache=True,
        ).logits
        cache.length += ids.shape[1]
        return logits


class SourceCache:
    """The encoder's states, and keys and values as transformers keeps them."""

    def __init__(self, memory: Tensor, source_lengths: Tensor) -> None:
        self.memory = memory
        self.mask = reachable(memory, source_lengths)
        self.inner: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.length = 0

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] holds."""
        self.inner.reorder_cache(rows)
        self.memory, self.mask = self.memory.index_select(0, rows), self.mask.index_select(0, rows)


def reachable(padded: Tensor, lengths: Tensor) -> Tensor:
    """[B, S, ...] and lengths [B] -> int64 [B, S], 1 where there is no padding."""
    return (torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]).long()
