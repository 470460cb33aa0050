"""A model in memory, with what was read on the way."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from qlora_pipe.architecture import Architecture
from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.language import LanguageModel
from qlora_pipe.nn.seq2seq import Seq2SeqModel
from qlora_pipe.residency.choice import AtRest, Lives


def tie(module: nn.Module, ties: Mapping[str, str]) -> None:
    """Let parameters share others' storage, as an Architecture's `ties` names them: {name: source}."""
    for name, source in ties.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, module.get_parameter(source))


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what was read on the way."""

    module: nn.Module
    architecture: Architecture
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device
    residency: Lives = field(default_factory=lambda: AtRest("resident"))

    @property
    def language(self) -> LanguageModel:
        """The module as what training asks of it, whatever its kind."""
        return cast(LanguageModel, self.module)

    @property
    def causal(self) -> CausalModel:
        """The module as what generation asks of it, where the family's kind is causal."""
        return cast(CausalModel, self.module)

    @property
    def seq2seq(self) -> Seq2SeqModel:
        """The module as what generation asks of it, where the family's kind is seq2seq."""
        return cast(Seq2SeqModel, self.module)

    def require_ids(self, ids: Iterable[int]) -> None:
        """Raise DataError where an id has no row in the embedding: the tokenizer belongs to another model."""
        size, largest = self.config.get("vocab_size"), max(ids, default=0)
        if isinstance(size, int) and largest >= size:
            raise DataError(
                f"the tokenizer gives the id {largest}, and the model's vocabulary ends at {size - 1}:"
                " tokenizer.json and config.json do not belong together."
            )

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a text: generation_config's eos_token_id, else config's; one id or a list.

        ConfigError where that is no id: a text that never ends would be put down to the model.
        """
        for file, config in (("generation_config.json", self.generation_config), ("config.json", self.config)):
            found = config.get("eos_token_id")
            if found is None:
                continue
            ids = found if isinstance(found, list) else [found]
            if not all(type(item) is int and item >= 0 for item in ids):
                raise ConfigError(
                    f'{file}: "eos_token_id" is {repr(found)[:60]}; it must be a token\'s id or a list of ids.'
                )
            return frozenset(ids)
        return frozenset()
