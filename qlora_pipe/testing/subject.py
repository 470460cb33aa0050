"""One family under test: what the checks make of it, each once, and how they say what is wrong."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_pipe.architecture import Architecture
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint
from qlora_pipe.config import FinetuneConfig, QuantizeConfig
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.nn.adapt import adapters_of
from qlora_pipe.nn.language import Inputs, LanguageModel
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import Plugins, plugins_of
from qlora_pipe.stages.load import load
from qlora_pipe.stages.quantize import quantize
from qlora_pipe.testing.checkpoints import tiny_checkpoint
from qlora_pipe.train.session import adapt

CPU = torch.device("cpu")
CLOSE = 1e-5
"""How far logits may lie apart where the arithmetic differs in its order, as a share of the largest."""
FIRST_TEXT_ID = 3
"""Those before it are the tokenizer's control tokens."""
_RANK = 3


class BrokenPromise(AssertionError):
    """A plugin does not keep what qlora_pipe builds on: one sentence says which promise, and what to look at."""


class LeftOut(Exception):
    """A promise that this plugin does not make; why."""


class _Alone:
    """A plugin that brings one family."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture

    @hookimpl
    def register_architectures(self) -> list[Architecture]:
        return [self._architecture]


class Subject:
    """A family with the config of a small model, in a folder of its own."""

    def __init__(self, architecture: Architecture, *, config: Mapping[str, Any] | None, folder: Path) -> None:
        self.architecture = architecture if config is None else replace(architecture, tiny=config)
        self.folder = folder

    @property
    def config(self) -> Mapping[str, Any]:
        """What config.json holds."""
        return self.architecture.tiny

    @property
    def is_causal(self) -> bool:
        """Whether the model continues one sequence."""
        return self.architecture.kind == "causal"

    @cached_property
    def manager(self) -> Plugins:
        """Plugins that bring this family and nothing else."""
        return plugins_of(_Alone(self.architecture))

    @cached_property
    def module(self) -> LanguageModel:
        """The model on the meta device."""
        with torch.device("meta"):
            return cast(LanguageModel, self.architecture.build(self.config))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all that a checkpoint holds, and of what is tied."""
        return {name: tuple(each.shape) for name, each in self.module.state_dict().items()}

    @cached_property
    def linears(self) -> list[str]:
        """The paths of the linear layers."""
        return [path for path, part in self.module.named_modules() if isinstance(part, nn.Linear)]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """A checkpoint of random weights."""
        return Checkpoint.open(tiny_checkpoint(self.folder / "checkpoint", family=self.architecture))

    @cached_property
    def store(self) -> QuantizedCheckpoint:
        """The same in 4 bits."""
        quantize(self.checkpoint, self.folder / "store", QuantizeConfig(), manager=self.manager)
        return QuantizedCheckpoint.open(self.folder / "store")

    def loaded(
        self,
        base: Checkpoint | QuantizedCheckpoint,
        *,
        dtype: torch.dtype = torch.float32,
        adapter: Adapter | None = None,
    ) -> LoadedModel:
        """Load a base as every command does."""
        return load(base, self.architecture, dtype=dtype, device=CPU, adapter=adapter)

    def adapted(self) -> LoadedModel:
        """The 4-bit model with adapters that change it, ready to be trained."""
        model = self.loaded(self.store)
        adapt(model, FinetuneConfig(rank=_RANK, dropout=0.0), start=None)
        for layer in adapters_of(model.module).values():
            layer.lora_b.data.normal_(std=0.05)
        model.module.train()
        return model

    @cached_property
    def inputs(self) -> Inputs:
        """Two rows of ids without padding; of an encoder-decoder model, with a source that is shorter in the second."""
        ids = self._ids((2, 11))
        if self.is_causal:
            return Inputs(ids)
        return Inputs(ids, source=self._ids((2, 9)), source_lengths=torch.tensor([9, 6]))

    def _ids(self, shape: tuple[int, int]) -> Tensor:
        draws = torch.Generator().manual_seed(sum(shape))
        return torch.randint(FIRST_TEXT_ID, self.config["vocab_size"], shape, generator=draws)

    def require(self, kept: bool, sentence: str) -> None:
        """Raise BrokenPromise with a sentence unless a promise is kept."""
        if not kept:
            raise BrokenPromise(f"{self.architecture.name}: {sentence}")

    def require_close(self, found: Tensor, wanted: Tensor, sentence: str, *, share: float = CLOSE) -> None:
        """Raise BrokenPromise unless two tensors differ by at most `share` of the largest value."""
        self.require(
            found.shape == wanted.shape, f"{sentence} (shapes {list(found.shape)} and {list(wanted.shape)} differ)"
        )
        apart, bound = float((found - wanted).abs().max()), share * float(wanted.abs().max())
        # NaN is in no order.
        self.require(apart <= bound, f"{sentence} (they differ by {apart:.3g}, allowed is {bound:.3g})")


@torch.no_grad()
def logits_of(module: nn.Module, inputs: Inputs) -> Tensor:
    """Run a whole model without a cache: logits [B, T, vocabulary]."""
    model = cast(LanguageModel, module)
    return model.head(model.hidden_of(inputs))
