"""Read a model's config.json one field at a time, each checked when it is read.

A config comes from a stranger: a field may be missing, of the wrong type, NaN, or absurd. Whatever is asked here is
either sane or a ConfigError that names the field, what there is, and what is accepted. As everywhere in this format,
null means the same as absent.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Self

from qlora_pipe.errors import ConfigError

_SHOWN_CHARACTERS = 60
# JSON's integers have no end; a float's range does.
_MOST_INTEGER = 2**63


class Fields:
    """The fields of a config, or of a section of one."""

    def __init__(self, values: Mapping[str, Any], *, prefix: str = "") -> None:
        self.values = values
        self._prefix = prefix

    def has(self, name: str) -> bool:
        """Say whether a field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, *, most: int, least: int = 1, default: int | None = None) -> int:
        """Read a whole number between two bounds, both included."""
        value = self._value(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"a whole number from {least} to {most}")
        return value

    def number(
        self,
        name: str,
        *,
        default: float | None = None,
        above: float = -math.inf,
        at_least: float = -math.inf,
        at_most: float = math.inf,
    ) -> float:
        """Read a finite number within its bounds."""
        value = self._value(name, default)
        is_number = type(value) is float or (type(value) is int and abs(value) < _MOST_INTEGER)
        if not (is_number and math.isfinite(value) and above < value and at_least <= value <= at_most):
            bounds = [("above", above), ("at least", at_least), ("at most", at_most)]
            limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
            raise self.error(name, f"a finite number {limits}".rstrip())
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """Read true or false."""
        value = self._value(name, default)
        if type(value) is not bool:
            raise self.error(name, "true or false")
        return value

    def choice(self, name: str, options: Collection[str], *, default: str) -> str:
        """Read one of several words."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in options:
            raise self.error(name, f"one of {', '.join(options)}")
        return value

    def choices(self, name: str, options: Collection[str], *, count: int) -> list[str]:
        """Read a list of so many words, each one of several."""
        value = self._value(name, None)
        known = isinstance(value, list) and all(isinstance(word, str) and word in options for word in value)
        if not known or len(value) != count:
            raise self.error(name, f"a list of {count}, each one of {', '.join(options)}")
        return list(value)

    def section(self, name: str) -> Self | None:
        """Open an object inside the config; None where it is absent or empty."""
        value = self._value(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, "an object")
        return type(self)(value, prefix=f"{self._prefix}{name}.") if value else None

    def error(self, name: str, accepted: str) -> ConfigError:
        """Say what a field holds and what it must be instead."""
        held = "is missing"
        if self.has(name):
            text = repr(self.values[name])
            held = f"is {text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + '...'}"
        return ConfigError(f'config.json: "{self._prefix}{name}" {held}; it must be {accepted}.')

    def _value(self, name: str, default: Any) -> Any:
        return self.values[name] if self.has(name) else default
