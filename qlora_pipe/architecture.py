"""What a plugin says about a family of models.

An Architecture is data. The store, the loader, the adapters and the decoder read it; none of them knows a family's
name. Patterns are globs over dotted names in which one `*` stands for one component or a part of one:
`model.layers.*.self_attn.*_proj` matches `model.layers.7.self_attn.q_proj`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


def no_ties(_config: Mapping[str, Any]) -> Mapping[str, str]:
    """Say that no two parameters share their storage."""
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A model family: how to build it, and what of it is quantised and adapted."""

    name: str
    """The family's name, as `qlora-pipe plugins` lists it."""

    model_types: tuple[str, ...]
    """Values of config.json's `model_type` that this family reads."""

    kind: Literal["causal", "seq2seq"]
    """Whether the model continues one sequence or maps a source to a target."""

    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"]
    """PEFT's name of the same, written into adapters."""

    build: Callable[[Mapping[str, Any]], "torch.nn.Module"]
    """Make the model from a checkpoint's config, on the meta device; ConfigError names a field it can't take."""

    blocks: tuple[str, ...]
    """Prefixes of the groups that lie together in the store, such as `model.layers.*`."""

    quantize: tuple[str, ...]
    """Weights that the store keeps in 4 bits, such as `model.layers.*.mlp.*_proj.weight`."""

    keep_16bit: tuple[str, ...]
    """Linear modules kept in 16 bits, by components of their paths, such as `lm_head`; other tools read this list in
    the store's config. One that `quantize` matches too is in 4 bits where a plugin's `choose_precision` asks for it."""

    adapt: tuple[str, ...]
    """Linear modules that get a LoRA adapter, such as `model.layers.*.mlp.*_proj`."""

    packs: bool = False
    """Whether the model keeps apart the samples of a row that holds several: it reads the `packing` of its `embed`."""

    ties: Callable[[Mapping[str, Any]], Mapping[str, str]] = no_ties
    """From a config: parameters that share another's storage, {"lm_head.weight": "model.embed_tokens.weight"}."""

    untied_if_stored: tuple[str, ...] = ()
    """Of the names in `ties`, those that are tied only where a checkpoint has no tensor of that name."""

    unread: tuple[str, ...] = ()
    """Tensors that checkpoints carry and the model does not have."""

    shared: tuple[str, ...] = ()
    """Tensors of a block that other blocks need, too: they stay where the model computes while blocks come and go."""

    no_float16: str | None = None
    """Why the model is not computed in float16, to stand after "because"; None where it may be."""

    tiny: Mapping[str, Any] = field(default_factory=dict)
    """A whole config.json of a small model, for tests: two blocks, hidden states of some 32 components, a vocabulary of
    at least 259. `qlora_pipe.testing` makes checkpoints of it."""

    def ties_of(self, config: Mapping[str, Any], names: Collection[str]) -> Mapping[str, str]:
        """Say which parameters of a checkpoint with these tensors share another's storage."""
        own = {name for name in self.untied_if_stored if name in names}
        return {name: source for name, source in self.ties(config).items() if name not in own}


@lru_cache(maxsize=256)
def _compiled(patterns: tuple[str, ...], *, prefix: bool) -> re.Pattern[str]:
    bodies = ["[^.]*".join(re.escape(part) for part in pattern.split("*")) for pattern in patterns]
    end = r"(?=\.|\Z)" if prefix else r"\Z"
    return re.compile("|".join(rf"(?:{body}){end}" for body in bodies) or r"(?!)")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Say whether a dotted name matches one of the patterns as a whole."""
    return _compiled(tuple(patterns), prefix=False).match(name) is not None


def block_of(name: str, patterns: Iterable[str]) -> str | None:
    """Name the block a tensor belongs to, `model.layers.7`, or None where it belongs to none."""
    found = _compiled(tuple(patterns), prefix=True).match(name)
    return None if found is None else found.group()


def names_part(pattern: str, name: str) -> bool:
    """Say whether a pattern names one or more whole components of a dotted name, anywhere in it: `layers.*.mlp`."""
    body = "[^.]*".join(re.escape(part) for part in pattern.split("*"))
    return re.search(rf"(?:^|\.){body}(?:\.|$)", name) is not None
