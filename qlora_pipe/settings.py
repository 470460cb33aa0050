"""Check settings, whatever door they came through: flags, a YAML file or Python."""

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qlora_pipe.errors import ConfigError, MissingInputError, UsageProblem

C = TypeVar("C")
_BOUNDS: Mapping[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple[str, ...]: "a list of texts",
}


def checked(config: type[C], values: Mapping[str, Any], *, where: str) -> C:
    """Make a config from values.

    ConfigError names the setting, what it was given and what it takes; UsageProblem two that exclude each other.
    """
    known = {item.name: item for item in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: there is no setting {name!r}{did_you_mean(name, known)}.")
    for one, other in getattr(config, "EXCLUSIVE", ()):
        if one in values and other in values:
            raise UsageProblem(f"{where}: {one} and {other} exclude each other: give one of them.")
    return config(**{name: _checked_value(config, known[name], value, where) for name, value in values.items()})


def did_you_mean(word: str, known: Mapping[str, Any]) -> str:
    """Propose the known name nearest to a misspelt one, or list them all."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else f" (there are: {', '.join(known)})"


def _checked_value(config: type, item: dataclasses.Field[Any], value: Any, where: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    # Numbers in YAML such as 1e-4 arrive as text, and 3.0 as a float; true for a number is a slip.
    hint = get_type_hints(config)[item.name]
    wanted = f"{item.name} takes {describe_type(config, item)}, and was given {value!r}"
    if isinstance(value, bool) and hint is not bool:
        raise ConfigError(f"{where}: {wanted}.")
    try:
        result = TypeAdapter(hint).validate_python(value)
    except ValidationError as fault:
        raise ConfigError(f"{where}: {wanted}.") from fault
    if isinstance(result, int | float) and not isinstance(result, bool):
        inside = all(_BOUNDS[name][1](result, bound) for name, bound in item.metadata["bounds"].items())
        if not (math.isfinite(result) and inside):
            raise ConfigError(f"{where}: {wanted}.")
    return result


def given_type(config: type, item: dataclasses.Field[Any]) -> Any:
    """Give the type of a setting that is given: `str` for one that may be left at None."""
    hint = get_type_hints(config)[item.name]
    if type(None) in get_args(hint):
        return Union[tuple(part for part in get_args(hint) if part is not type(None))]  # noqa: UP007
    return hint


def describe_type(config: type, item: dataclasses.Field[Any]) -> str:
    """Say in words what a setting takes: `a whole number, at least 1`."""
    hint = given_type(config, item)
    choices = choices_of(hint)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, choices))
    number = hint if not choices else next(part for part in get_args(hint) if part in _WORDS)
    bounds = [f"{_BOUNDS[name][0]} {bound}" for name, bound in item.metadata["bounds"].items()]
    words = ", ".join([_WORDS[number], *bounds])
    return f"{words}, or {' or '.join(map(str, choices))}" if choices else words


def choices_of(hint: Any) -> tuple[Any, ...]:
    """List the words a setting takes, or takes beside numbers; empty where it takes any."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for part in get_args(hint) if get_origin(part) is Literal for choice in get_args(part))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping strictly: no duplicate keys, no aliases, no tags; `1e-4` is a number."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as fault:
        raise MissingInputError(f"there is no config file {path}.") from fault
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {fault}.") from fault
    if len(text) > 1 << 20:
        raise ConfigError(f"{path} has {len(text):,} characters; a config file has at most 1,048,576.")
    try:
        # _strict_loader derives from SafeLoader: it builds plain data only.
        found = yaml.load(text, Loader=_strict_loader())
    except (yaml.YAMLError, RecursionError) as fault:
        raise ConfigError(f"{path} is not usable YAML: {' '.join(str(fault).split())}.") from fault
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{path} must hold `name: value` lines, one per setting.")
    return found


def _strict_loader() -> type[Any]:
    import re

    import yaml

    class StrictLoader(yaml.SafeLoader):
        """PyYAML's safe loader without what surprises: duplicate keys, aliases, 1e-4 as text."""

        def compose_node(self, parent: Any, index: int) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases are not read here; write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.YAMLError(f"the key {key!r} stands there twice (line {node.start_mark.line + 1})")
            return super().construct_mapping(node, deep=deep)

    number = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z")
    StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return StrictLoader


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write settings as YAML, in their order."""
    import yaml

    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=False)
    return text


def take(values: dict[str, Any], key: str, *, where: str) -> str | None:
    """Take a text such as a path out of a config file's values, None if it is absent; ConfigError if it is no text."""
    found = values.pop(key, None)
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"{where}: {key} takes a text, and was given {found!r}.")
    return found
