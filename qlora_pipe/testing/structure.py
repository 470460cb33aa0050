"""What an Architecture says of its model, compared with the model itself; nothing is computed."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pipe.architecture import Architecture, block_of, matches
from qlora_pipe.errors import QlorapipeError
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.seq2seq import Seq2SeqModel
from qlora_pipe.plugin_items import fault_of_item
from qlora_pipe.testing.checkpoints import byte_tokenizer
from qlora_pipe.testing.subject import BrokenPromise, Subject

_TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
_MISSING = object()
# What a damaged or hostile config.json may hold in any field.
_NONSENSE: tuple[Any, ...] = (_MISSING, "nonsense", -1, math.nan, [], {"a": 1})


def check_fields(subject: Subject) -> None:
    """Every field has its type, and they agree with each other."""
    architecture, config = subject.architecture, subject.config
    fault = fault_of_item(architecture, Architecture)
    subject.require(fault is None, f"the plugin {fault}.")
    task = _TASKS[architecture.kind]
    subject.require(
        architecture.task_type == task,
        f"its task_type is {architecture.task_type}; of a {architecture.kind} model it is {task}.",
    )
    subject.require(
        architecture.kind == "causal" or not architecture.packs,
        "it says that it packs, which is for causal models alone: leave packs at False.",
    )
    subject.require(
        config.get("model_type") in architecture.model_types,
        f"its tiny config has the model_type {config.get('model_type')!r}, which is none of its model_types.",
    )
    vocabulary, least = config.get("vocab_size"), byte_tokenizer(architecture.kind).get_vocab_size()
    subject.require(
        isinstance(vocabulary, int) and vocabulary >= least,
        f"its tiny config has the vocab_size {vocabulary!r}; the tokenizer that goes with it has {least} ids.",
    )


def check_meta(subject: Subject) -> None:
    """The model is of the right class, and nothing of it takes memory before weights are loaded."""
    module: nn.Module = subject.module
    wanted = CausalModel if subject.is_causal else Seq2SeqModel
    subject.require(
        isinstance(module, wanted),
        f"build gives a {type(module).__name__}, and a model of kind {subject.architecture.kind} is a {wanted.__name__}"
        f" (qlora_pipe.nn).",
    )
    stored = subject.shapes.keys()
    for name, each in (*module.named_parameters(), *module.named_buffers()):
        subject.require(
            each.is_meta,
            f"build puts {name} on the device {each.device}: it must allocate nothing, so leave the device to whoever"
            " calls it.",
        )
        subject.require(
            name in stored,
            f"the buffer {name} is not in a checkpoint, so nobody gives it values: make such a table at its first use,"
            " not in __init__.",
        )
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            subject.require(
                not isinstance(value, Tensor),
                f"{path or 'the model'} keeps a tensor, {name}, that is made in __init__ and has no values there: make"
                " it at its first use.",
            )


def check_names(subject: Subject) -> None:
    """A parameter has one name, or `ties` says which names share it."""
    module, ties = subject.module, subject.architecture.ties(subject.config)
    for name, source in ties.items():
        for each in (name, source):
            subject.require(each in subject.shapes, f"ties names {each}, and the model has no such parameter.")
        subject.require(source not in ties, f"ties lets {name} share {source}, which itself shares another's storage.")
        subject.require(
            subject.shapes[name] == subject.shapes[source],
            f"ties lets {name} share {source}, of the shapes {subject.shapes[name]} and {subject.shapes[source]}.",
        )
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        subject.require(
            other == name or ties.get(name, name) == ties.get(other, other),
            f"{other} and {name} are one parameter under two names: a checkpoint holds it once, so ties must say it.",
        )


def check_blocks(subject: Subject) -> None:
    """The groups of the store are the model's blocks."""
    patterns = subject.architecture.blocks
    _require_all_match(subject, "blocks", patterns, [*subject.shapes], as_prefix=True)
    paths = {id(part): path for path, part in subject.module.named_modules()}
    blocks = [paths.get(id(block)) for block in subject.module.blocks]
    subject.require(bool(blocks), "the model's blocks are none: what is trained and streamed lies in them.")
    subject.require(None not in blocks, "one of the model's blocks is no part of the model: give its own modules.")
    groups = {group for name in subject.shapes if (group := block_of(name, patterns)) is not None}
    subject.require(
        groups == set(blocks),
        f"its blocks are {_some(blocks)} in the model and {_some(groups)} by the patterns of `blocks`: a store's groups"
        " come and go with the model's blocks, so they must be the same.",
    )


def check_quantize(subject: Subject) -> None:
    """What is quantised are the weights of linear layers in blocks; every other linear layer is kept by name."""
    architecture = subject.architecture
    _require_all_match(subject, "quantize", architecture.quantize, [*subject.shapes])
    _require_all_match(subject, "keep_16bit", architecture.keep_16bit, [p for p, _ in subject.module.named_modules()])
    linears = {f"{path}.weight" for path in subject.linears}
    for name, shape in subject.shapes.items():
        if not matches(name, architecture.quantize):
            continue
        subject.require(
            name in linears and len(shape) == 2,
            f"quantize matches {name}, which is no weight of an nn.Linear: only those can be computed with in 4 bits.",
        )
        subject.require(
            block_of(name, architecture.blocks) is not None,
            f"quantize matches {name}, which lies in no block: outside of blocks weights stay in 16 bits.",
        )
    for path in subject.linears:
        subject.require(
            matches(f"{path}.weight", architecture.quantize) or _is_kept(path, architecture),
            f"the linear layer {path} is neither in quantize nor in keep_16bit: other tools that read the store would"
            " take its weight for packed.",
        )


def check_adapt(subject: Subject) -> None:
    """What is adapted are linear layers in blocks."""
    architecture = subject.architecture
    _require_all_match(subject, "adapt", architecture.adapt, [p for p, _ in subject.module.named_modules()])
    for path, part in subject.module.named_modules():
        if not matches(path, architecture.adapt):
            continue
        subject.require(
            isinstance(part, nn.Linear), f"adapt matches {path}, a {type(part).__name__}: adapters go on linear layers."
        )
        subject.require(
            block_of(f"{path}.weight", architecture.blocks) is not None,
            f"adapt matches {path}, which lies in no block: training runs block by block and would not reach it.",
        )


def check_configs(subject: Subject) -> None:
    """A config that can't be used is a ConfigError, whatever stands in it."""
    for name in subject.config:
        for value in _NONSENSE:
            config: dict[str, Any] = {**subject.config, name: value}
            if value is _MISSING:
                del config[name]
            held = "without" if value is _MISSING else f"with {value!r} for"
            try:
                with torch.device("meta"):
                    subject.architecture.build(config)
                    subject.architecture.ties(config)
            except QlorapipeError:
                continue
            except Exception as fault:
                raise BrokenPromise(
                    f"{subject.architecture.name}: {held} the config's {name}, build raises {type(fault).__name__}"
                    f" ({fault}); it must be a ConfigError that names the field: read it with qlora_pipe.nn.fields."
                ) from fault


def _require_all_match(
    subject: Subject, field: str, patterns: tuple[str, ...], names: list[str], *, as_prefix: bool = False
) -> None:
    for pattern in patterns:
        if as_prefix:
            found = any(block_of(name, [pattern]) for name in names)
        else:
            found = any(
                _ends_with(name, pattern) if field == "keep_16bit" else matches(name, [pattern]) for name in names
            )
        subject.require(
            found, f"the pattern {pattern!r} of {field} matches nothing in the model, such as {_some(names)}."
        )


def _is_kept(path: str, architecture: Architecture) -> bool:
    return any(_ends_with(path, pattern) for pattern in architecture.keep_16bit)


def _ends_with(path: str, pattern: str) -> bool:
    """Whether a pattern matches a path or its last components: that is how other tools read `keep_16bit`."""
    parts = path.split(".")
    return any(matches(".".join(parts[start:]), [pattern]) for start in range(len(parts)))


def _some(names: Any) -> str:
    shown = sorted(str(name) for name in names if name)
    return f"{', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''}" or "none"
