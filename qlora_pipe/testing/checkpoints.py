"""Tiny checkpoints of every registered family, whole and deterministic, and models from weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
from safetensors.torch import save
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from qlora_formats.commit import write_file
from qlora_pipe.architecture import Architecture
from qlora_pipe.errors import ConfigError
from qlora_pipe.plugins import architectures, load_plugins
from qlora_pipe.testing.weights import drawn_weights, tiny_weights

# What the vocabulary begins with, in the order of its ids.
_CAUSAL_TOKENS = ("<unk>", "<s>", "</s>")
_SEQ2SEQ_TOKENS = ("<pad>", "</s>", "<unk>")
_MOST_EXTRA_IDS = 100
_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def tiny_checkpoint(
    folder: Path,
    *,
    family: str | Architecture = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    extra_ids: int | None = None,
    **overrides: Any,
) -> Path:
    """Make a complete checkpoint of random weights in `folder`, and give the folder.

    `family` is an Architecture, or the name of an installed one; its `tiny` is the config. `overrides` replace or
    extend the fields of config.json (None removes one): sizes, biases, RoPE scaling, a tied head. The tokenizer is
    `byte_tokenizer` of the family's kind, with as many extra ids as the vocabulary has room for, or `extra_ids`. The
    same arguments give the same bytes. ConfigError where there is no such family, or it has no `tiny`.
    """
    architecture = family if isinstance(family, Architecture) else installed_family(family)
    config = tiny_config(architecture, overrides)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if architecture.name == "llama":
        weights = tiny_weights(config, seed=seed)
    else:
        weights = drawn_weights(architecture, config, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: weight.to(dtype) for name, weight in weights.items()}
    write_file(folder / "model.safetensors", save(stored, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {key: config[key] for key in _GENERATION_KEYS if key in config})
    if extra_ids is None and architecture.kind == "seq2seq":
        room = config["vocab_size"] - len(_SEQ2SEQ_TOKENS) - 256
        extra_ids = max(0, min(room, _MOST_EXTRA_IDS))
    write_tokenizer(folder, kind=architecture.kind, extra_ids=extra_ids or 0)
    return folder


def installed_family(name: str) -> Architecture:
    """Find a family by its own name, `llama`; ConfigError lists those that are installed."""
    known = architectures(load_plugins())
    if name not in known:
        raise ConfigError(f"there is no model family {name!r} (installed: {', '.join(known) or 'none'}).")
    return known[name]


def tiny_config(architecture: Architecture, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Give the config of a family's tiny model, with fields replaced, or removed by None; ConfigError without one."""
    if not architecture.tiny:
        raise ConfigError(
            f"the family {architecture.name} gives no config to make a tiny checkpoint of: set its Architecture's tiny."
        )
    return {key: value for key, value in {**architecture.tiny, **overrides}.items() if value is not None}


def write_tokenizer(folder: Path, *, kind: Literal["causal", "seq2seq"] = "causal", extra_ids: int = 0) -> None:
    """Write the files of `byte_tokenizer` into a folder."""
    write_file(folder / "tokenizer.json", byte_tokenizer(kind, extra_ids=extra_ids).to_str(pretty=True).encode())
    if kind == "causal":
        tokens: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    else:
        tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, its keys in their order."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def filled(
    architecture: Architecture, config: Mapping[str, Any], weights: Mapping[str, Tensor], *, dtype: torch.dtype
) -> nn.Module:
    """Build a model and fill it with weights, ready to compute: for tests of a plugin's modules without a folder.

    RuntimeError where names or shapes of weights and model differ.
    """
    with torch.device("meta"):
        model = architecture.build(config)
    tied = {name: weights[source] for name, source in architecture.ties_of(config, weights).items()}
    model.load_state_dict({**weights, **tied}, assign=True)
    return model.to(dtype).eval().requires_grad_(False)


def byte_tokenizer(kind: Literal["causal", "seq2seq"] = "causal", *, extra_ids: int = 0) -> tokenizers.Tokenizer:
    """Make a tokenizer of three control tokens, the 256 bytes and the extra ids; it encodes any text.

    A causal one is like LLaMA's: `<unk>` 0, `<s>` 1, `</s>` 2; it puts BOS in front of a text. A seq2seq one is like
    T5's: `<pad>` 0, `</s>` 1, `<unk>` 2; it puts EOS behind a text. Its extra ids are the sentinels of span corruption,
    and count down as T5's do: the last id of the vocabulary is `<extra_id_0>`.
    """
    control = _CAUSAL_TOKENS if kind == "causal" else _SEQ2SEQ_TOKENS
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*control, *alphabet, *sentinels])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*control, *sentinels])
    single, pair, mark = (
        ("<s> $A", "<s> $A <s> $B", "<s>") if kind == "causal" else ("$A </s>", "$A </s> $B </s>", "</s>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(mark, vocabulary[mark])]
    )
    return tokenizer
