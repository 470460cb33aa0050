"""From a config to a family: what transformers would build, and which of its layers are quantised and adapted."""

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from logging import ERROR
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, logging
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from qlora_pipe.architecture import Architecture
from qlora_pipe.errors import ConfigError
from qlora_plugins.transformers_models.model import Causal, Seq2Seq


def family_of(config: Mapping[str, Any]) -> Architecture | None:
    """Describe the family of a config.json; None where transformers has no language model of its `model_type`.

    ConfigError where it has one that can't be built from this config, or whose blocks hold no linear layers.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    seq2seq = bool(config.get("is_encoder_decoder")) and model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if not seq2seq and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    with torch.device("meta"):
        inner = _built(config, seq2seq=seq2seq)
    linears = [path for path, part in inner.named_modules() if isinstance(part, nn.Linear)]
    uses = {path: _use_of_weight(inner, path) for path in linears}
    inside = [path for path in linears if _block(path) and uses[path] != "itself"]
    if not inside:
        raise ConfigError(
            f"models of type {model_type!r}, as transformers builds them, have no linear layers in their blocks:"
            " there is nothing to quantise or to adapt."
        )
    patterns = tuple(dict.fromkeys(map(_pattern, inside)))
    dense = {_pattern(path) for path in inside if uses[path] == "type"}
    quantized = tuple(pattern for pattern in patterns if pattern not in dense)
    ties = dict(inner.all_tied_weights_keys)
    return Architecture(
        name=f"{model_type} (transformers)",
        model_types=(model_type,),
        kind="seq2seq" if seq2seq else "causal",
        task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        build=partial(_build, seq2seq=seq2seq),
        blocks=tuple(dict.fromkeys(_pattern(block) for path in inside if (block := _block(path)))),
        quantize=tuple(f"{pattern}.weight" for pattern in quantized),
        keep_16bit=_kept(linears, quantized),
        adapt=patterns,
        # The family is made for this one config.
        ties=lambda _config: ties,
    )


def _use_of_weight(inner: nn.Module, path: str) -> Literal["none", "type", "itself"]:
    """What the code around a layer does with its weight beside calling the layer.

    Where it asks for its type, the weight has to be dense; where it computes with it, no adapter would be heard.
    """
    owner, _, leaf = path.rpartition(".")
    code = inspect.getsource(type(inner.get_submodule(owner)))
    found = re.findall(rf"\bself\.{re.escape(leaf)}\.weight\b(\.(?:dtype|device)\b)?", code)
    # In a test of its type it may stand as a whole.
    tested = len(re.findall(rf"isinstance\(self\.{re.escape(leaf)}\.weight\b", code))
    if found.count("") > tested:
        return "itself"
    return "type" if found else "none"


def _kept(linears: Sequence[str], quantized: Sequence[str]) -> tuple[str, ...]:
    """Names, by their last components, of the linear layers that are never quantised."""
    last = {path.rpartition(".")[2] for path in linears if _pattern(path) not in quantized}
    return tuple(sorted(last - {pattern.rpartition(".")[2] for pattern in quantized}))


def _block(path: str) -> str | None:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`: the first numbered component ends a block's name."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", path)
    return found.group() if found else None


def _pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|\Z)", "*", path)


def _build(config: Mapping[str, Any], *, seq2seq: bool) -> nn.Module:
    inner = _with_buffers(config, seq2seq=seq2seq)
    return Seq2Seq(inner) if seq2seq else Causal(inner)


def _with_buffers(config: Mapping[str, Any], *, seq2seq: bool) -> PreTrainedModel:
    """Build a model on the meta device but for the buffers that no file holds, such as the angles of rotations."""
    with torch.device("meta"):
        inner = _built(config, seq2seq=seq2seq)
    # They are made in constructors, so a second model is made whose parameters are dropped as they come.
    dropped = register_module_parameter_registration_hook(_on_meta)
    try:
        with torch.device("cpu"):
            real = _built(config, seq2seq=seq2seq)
    finally:
        dropped.remove()
    for path, part in real.named_modules():
        mine = inner.get_submodule(path)
        for name, buffer in part._buffers.items():
            if name in part._non_persistent_buffers_set:
                mine._buffers[name] = buffer
    return inner


def _on_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> Any:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


def _built(config: Mapping[str, Any], *, seq2seq: bool) -> PreTrainedModel:
    """What transformers makes of a config; its own dropout off, for the adapters have theirs."""
    fields = copy.deepcopy(dict(config))
    # Never code from a model's folder.
    fields.pop("auto_map", None)
    fields.pop("quantization_config", None)
    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        theirs = AutoConfig.for_model(fields.pop("model_type"), **fields)
        for name, value in vars(theirs).items():
            if "drop" in name and isinstance(value, int | float):
                setattr(theirs, name, 0.0)
        # Generation asks for a cache where it wants one.
        theirs.use_cache = False
        kind: Any = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        model: PreTrainedModel = kind.from_config(theirs)
    except Exception as fault:
        # The library checks configs in many places, each with errors of its own.
        first = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise ConfigError(
            f"transformers can't build a {config.get('model_type')} of this config.json: {first}"
        ) from fault
    finally:
        logging.set_verbosity(before)
    return model
