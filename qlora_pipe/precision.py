"""Which weights a store keeps in 4 bits: the architecture's list, less what a plugin or the user leaves in 16."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pluggy

from qlora_pipe.architecture import Architecture, matches, names_part
from qlora_pipe.errors import ConfigError


class Precision(NamedTuple):
    """The weights to quantise, and those that are not as the architecture has it; names in the order they came."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    """In 16 bits, which the architecture would have in 4."""
    besides: tuple[str, ...]
    """In 4 bits, which the architecture would have in 16; they are among `quantized`, too."""
    skip_modules: tuple[str, ...]
    """What names the modules, by a component of their path or the whole, of which no reader must expect 4 bits."""


def choose_precision(
    names: Iterable[str],
    architecture: Architecture,
    *,
    model_type: str,
    kind: str,
    keep: Sequence[str],
    manager: pluggy.PluginManager,
) -> Precision:
    """Decide for every tensor of a model: `keep` comes first, then the hook `choose_precision`, then the architecture.

    A pattern of `keep` names whole components of a dotted name, anywhere in it, `*` standing for one or a part of one:
    `down_proj`, `layers.0`, `layers.*.mlp`. Raises ConfigError for a pattern that keeps nothing, and for a plugin that
    answers with another 4-bit type than `kind`, or for a tensor that the architecture never quantises.
    """
    unused = dict.fromkeys(keep)
    quantized: list[str] = []
    kept: list[str] = []
    besides: list[str] = []
    left: list[str] = []
    for name in names:
        quantisable = matches(name, architecture.quantize)
        answer = manager.hook.choose_precision(model_type=model_type, tensor=name)
        if answer not in (None, "keep", kind):
            raise ConfigError(
                f"a plugin's choose_precision answered {answer!r} for {name}; here it may answer {kind!r}, 'keep' or"
                " None."
            )
        if answer == kind and not quantisable:
            raise ConfigError(
                f"a plugin's choose_precision asked for {name} in 4 bits, which {architecture.name} models keep in 16;"
                f" they quantise {', '.join(architecture.quantize)}."
            )
        if not quantisable:
            continue
        wanted = [pattern for pattern in keep if names_part(pattern, name)]
        for pattern in wanted:
            unused.pop(pattern, None)
        in_16_bits = any(names_part(pattern, name) for pattern in architecture.keep_16bit)
        if wanted or answer == "keep" or (answer is None and in_16_bits):
            (left if in_16_bits else kept).append(name)
            continue
        quantized.append(name)
        if in_16_bits:
            besides.append(name)
    for pattern in unused:
        raise ConfigError(
            f"keep: {pattern!r} matches none of the weights that would be quantised, such as"
            f" {(quantized or kept or ['none'])[0]}; name whole components, with * for one: down_proj, layers.0."
        )
    skip = _skip_modules(architecture.keep_16bit, kept=kept, left=left, besides=besides)
    return Precision(tuple(quantized), tuple(kept), tuple(besides), skip)


def _skip_modules(
    patterns: Sequence[str], *, kept: Sequence[str], left: Sequence[str], besides: Sequence[str]
) -> tuple[str, ...]:
    """The patterns that still hold, and the names of the modules that these do not name."""
    hold = [pattern for pattern in patterns if not any(names_part(pattern, name) for name in besides)]
    named = (name for name in sorted([*kept, *left]) if not any(names_part(pattern, name) for pattern in hold))
    return (*hold, *(name.removesuffix(".weight") for name in named))
