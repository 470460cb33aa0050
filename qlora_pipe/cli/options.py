"""Options derived from config dataclasses: one setting, one flag."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from qlora_pipe.settings import checked, choices_of, describe_type, given_type

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)


def options_of(config: type) -> Callable[[F], F]:
    """Give a command one option per setting; those not on the command line arrive as None."""

    def decorate(command: F) -> F:
        for item in reversed(dataclasses.fields(config)):
            command = _option(config, item)(command)
        return command

    return decorate


def _option(config: type, item: dataclasses.Field[Any]) -> Callable[[F], F]:
    flag = "--" + item.name.replace("_", "-")
    hint = given_type(config, item)
    default = "" if item.default in (None, ()) else f"  [default: {shown_default(item)}]"
    text = item.metadata["help"] + default
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", item.name, default=None, help=text)
    if hint == tuple[str, ...]:
        return click.option(flag, item.name, multiple=True, metavar=item.metadata["entry"], help=text)
    kind: Any = {int: click.INT, float: click.FLOAT, str: click.STRING}.get(hint)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        # A choice of numbers stays a number: click gives back the member it was made from.
        kind = click.Choice(choices) if isinstance(choices[0], str) else click.INT
    metavar = describe_choices(hint)
    return click.option(flag, item.name, type=kind, default=None, metavar=metavar, help=text)


def describe_choices(hint: Any) -> str | None:
    """Show a setting's choices in its help, as click does for texts."""
    numbers = ["INTEGER"] if int in get_args(hint) else []
    choices = [*numbers, *map(str, choices_of(hint))]
    return "[" + "|".join(choices) + "]" if choices else None


def shown_default(item: dataclasses.Field[Any]) -> str:
    """Show a default as one would type it."""
    if isinstance(item.default, bool):
        return "on" if item.default else "off"
    return f"{item.default:g}" if isinstance(item.default, float) else str(item.default)


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings that were on the command line."""
    return {name: value for name, value in settings.items() if value not in (None, ())}


def config_of(config: type[C], settings: Mapping[str, Any], *, file: Mapping[str, Any] | None = None, where: str) -> C:
    """Join flags and a file's values, flags first, and check them."""
    return checked(config, {**(file or {}), **given(settings)}, where=where)


def describe_setting(config: type, item: dataclasses.Field[Any]) -> tuple[str, str, str, str]:
    """Give a setting's row in docs/config.md: name, what it takes, default, help."""
    default = "none" if item.default in (None, ()) else shown_default(item)
    return item.name, describe_type(config, item), default, item.metadata["help"]
