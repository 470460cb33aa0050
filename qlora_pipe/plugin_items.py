"""Check what plugins answer: a stranger's function can return anything."""

import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin

# A name stands before a colon on the command line.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SHOWN = 40


def fault_of_item(item: object, kind: type) -> str | None:
    """Say what is wrong with one thing that a plugin brings; None where it is a `kind` whose fields make sense."""
    if not isinstance(item, kind):
        return f"returned {shown(item)} in place of one {kind.__name__}"
    for each in fields(kind):
        value = getattr(item, each.name)
        wanted = _wanted(value, each.type)
        if wanted is None and each.name == "name" and not _NAME.fullmatch(value):
            wanted = "letters, digits, '.', '_' and '-'"
        if wanted is not None:
            return f"brings {_name_of(item)} whose {each.name} is {shown(value)}; it must be {wanted}"
    return None


def _wanted(value: object, hint: Any) -> str | None:
    """What a field must be instead of `value`; None where it is that."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return None if value in inner else f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        found = [_wanted(value, each) for each in inner]
        return None if None in found else " or ".join(str(each) for each in found)
    if origin is tuple:
        # A text is a sequence of texts too, and as patterns would match its letters.
        fits = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        return None if fits else "a list of texts"
    kind = hint if origin is None else origin
    words: Mapping[Any, str] = {Callable: "a function", Mapping: "a mapping", str: "a text", type(None): "None"}
    fits = callable(value) if kind is Callable else isinstance(value, kind)
    return None if fits else words.get(kind, f"a {kind.__name__}")


def _name_of(item: Any) -> str:
    name = getattr(item, "name", None)
    return f"{type(item).__name__} {name!r}" if isinstance(name, str) else f"one {type(item).__name__}"


def shown(value: object) -> str:
    """Show a value in a sentence, however long it is."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def listed(names: Iterable[str]) -> str:
    """Set names in a row, `none` where there are none."""
    return ", ".join(names) or "none"
