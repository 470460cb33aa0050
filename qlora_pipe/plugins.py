"""What plugins bring, by name: each call of load_plugins gives a fresh manager, so there is no global to restore."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import pluggy

from qlora_pipe.architecture import Architecture
from qlora_pipe.chat_template import ChatTemplate
from qlora_pipe.dataset import Dataset
from qlora_pipe.errors import ConfigError, UsageProblem
from qlora_pipe.exporter import Exporter
from qlora_pipe.plugin_items import fault_of_item, listed, shown
from qlora_pipe.plugin_loading import Plugins, built_ins_alone, install_all
from qlora_pipe.plugin_probe import said_of

__all__ = [
    "PluginEntry",
    "Plugins",
    "architectures",
    "built_ins_alone",
    "datasets",
    "exporters",
    "find_architecture",
    "find_dataset",
    "find_exporter",
    "list_plugins",
    "load_plugins",
    "plugins_of",
]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)

RESERVED_TEMPLATES = ("auto", "checkpoint")
"""What `--template` takes besides names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginEntry:
    """One thing a plugin brings: a row of `qlora-pipe plugins`."""

    name: str
    kind: str
    plugin: str
    distribution: str
    version: str
    help: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Registry(Generic[T]):
    """One kind of things that plugins bring."""

    kind: str
    hook: str
    item: type[T]


_ARCHITECTURES = _Registry(kind="architecture", hook="register_architectures", item=Architecture)
_DATASETS = _Registry(kind="dataset", hook="register_datasets", item=Dataset)
_CHAT_TEMPLATES = _Registry(kind="chat template", hook="register_chat_templates", item=ChatTemplate)
_EXPORTERS = _Registry(kind="exporter", hook="register_exporters", item=Exporter)
_REGISTRIES: tuple[_Registry[Any], ...] = (_ARCHITECTURES, _DATASETS, _CHAT_TEMPLATES, _EXPORTERS)


def load_plugins(*extra: object) -> Plugins:
    """Load every installed plugin and the given objects into a fresh manager.

    An installed plugin that can't be imported, whose hooks are wrong, or whose name is another's, is named on stderr
    and passed over; an object that was given is a ConfigError then. QLORA_PIPE_TRACE=1 prints each hook call,
    QLORA_PIPE_PLUGINS_TIMEOUT is how many seconds a plugin's import may take.
    """
    plugins = _traced()
    install_all(plugins)
    return _with(plugins, extra)


def plugins_of(*given: object) -> Plugins:
    """Make a manager of the given objects alone; ConfigError where their hooks are wrong."""
    return _with(_traced(), given)


def _traced() -> Plugins:
    plugins = Plugins()
    if os.environ.get("QLORA_PIPE_TRACE") == "1":
        plugins.trace.root.setwriter(lambda text: print(text, end="", file=sys.stderr))  # noqa: T201
        plugins.enable_tracing()
    return plugins


def _with(plugins: Plugins, given: tuple[object, ...]) -> Plugins:
    for plugin in given:
        plugins.take(plugin)
    return plugins


class _Brought(NamedTuple, Generic[T]):
    """One thing, and the name of the plugin that brings it."""

    plugin: str
    item: T


def _all_brought(manager: pluggy.PluginManager, registry: _Registry[T]) -> Iterator[_Brought[T]]:
    """Ask each plugin by itself; what one answers wrongly is put down to it, and the others are not touched."""
    names = {id(plugin): name for name, plugin in manager.list_name_plugin()}
    asked = [each.plugin for each in getattr(manager.hook, registry.hook).get_hookimpls()]
    for plugin in sorted(asked, key=lambda each: names[id(each)]):
        name = names[id(plugin)]
        alone = manager.subset_hook_caller(registry.hook, [each for each in asked if each is not plugin])
        try:
            # What a plugin prints must not get between the lines of a command's result.
            with contextlib.redirect_stdout(sys.stderr):
                answers = alone()
        except (Exception, SystemExit) as fault:
            _about(manager).blame(name, f"failed in {registry.hook}: {said_of(fault)}")
            continue
        # pluggy leaves out an answer that is None.
        answer = answers[0] if answers else None
        if not isinstance(answer, list | tuple):
            kind = registry.item.__name__
            _about(manager).blame(name, f"{registry.hook} returned {shown(answer)} where a list of {kind} is asked for")
            continue
        for item in answer:
            if (wrong := fault_of_item(item, registry.item)) is not None:
                _about(manager).blame(name, f"{registry.hook} {wrong}")
            else:
                yield _Brought(name, item)


def _by_name(manager: pluggy.PluginManager, registry: _Registry[T]) -> dict[str, list[_Brought[T]]]:
    """What the plugins bring by its name, in the order of names; more than one of a name is one too many."""
    found: dict[str, list[_Brought[T]]] = {}
    for each in sorted(_all_brought(manager, registry), key=lambda each: each.item.name):
        found.setdefault(each.item.name, []).append(each)
    return found


def _single(manager: pluggy.PluginManager, registry: _Registry[T]) -> dict[str, T]:
    """What can be used by its name; of two things of one name, neither, and a note says so."""
    single = {}
    for name, each in _by_name(manager, registry).items():
        if len(each) == 1:
            single[name] = each[0].item
        else:
            _about(manager).note(f"neither can be used: {_twice(manager, each, f'bring the {registry.kind} {name!r}')}")
    return single


def _about(manager: pluggy.PluginManager) -> Plugins:
    """Whom to ask about a manager's plugins: itself, or of one that was made by hand one that knows of none."""
    return manager if isinstance(manager, Plugins) else Plugins()


def _twice(manager: pluggy.PluginManager, found: list[_Brought[T]], what: str) -> str:
    owners = " and ".join(_about(manager).described(each.plugin) for each in found)
    return f"two plugins {what}, {owners}: uninstall one of them."


def architectures(manager: pluggy.PluginManager) -> dict[str, Architecture]:
    """Every model family that is installed, by its name."""
    return _single(manager, _ARCHITECTURES)


def datasets(manager: pluggy.PluginManager) -> dict[str, Dataset]:
    """Every dataset that is installed, by its name."""
    return _single(manager, _DATASETS)


def chat_templates(manager: pluggy.PluginManager) -> dict[str, ChatTemplate]:
    """Every chat template that is installed, by its name."""
    found = _single(manager, _CHAT_TEMPLATES)
    for name in found:
        if name in RESERVED_TEMPLATES or name.endswith(".jinja"):
            raise ConfigError(f"a plugin brings a chat template named {name!r}, which --template reads otherwise.")
    return found


def exporters(manager: pluggy.PluginManager) -> dict[str, Exporter]:
    """Every target of `export` that is installed, by its name."""
    return _single(manager, _EXPORTERS)


def find_architecture(
    manager: pluggy.PluginManager, model_type: object, *, config: Mapping[str, Any] | None = None
) -> Architecture:
    """Find the family that reads a config's `model_type`.

    With the whole config, plugins are also asked for a family made for it, where none is registered. ConfigError lists
    what is installed, or names two families that both read it: which one is meant would be a guess.
    """
    known = list(_all_brought(manager, _ARCHITECTURES))
    found = [each for each in known if model_type in each.item.model_types]
    if len(found) == 1:
        return found[0].item
    if found:
        raise ConfigError(_twice(manager, found, f"read model_type {model_type!r}"))
    made: Architecture | None = None if config is None else manager.hook.find_architecture(config=config)
    if made is not None:
        return made
    types = sorted(model_type for each in known for model_type in each.item.model_types)
    raise ConfigError(
        f"no installed plugin reads model_type {model_type!r} (installed: {listed(types)})."
        " Install one, or write it: docs/plugins.md; qlora-pipe[transformers] trains most others."
        f"{_about(manager).missing}"
    )


def _find(manager: pluggy.PluginManager, registry: _Registry[T], name: str, *, kind: str) -> T:
    known = _by_name(manager, registry)
    found = known.get(name, [])
    if len(found) == 1:
        return found[0].item
    if found:
        raise ConfigError(_twice(manager, found, f"bring the {kind} {name!r}"))
    raise UsageProblem(
        f"there is no {kind} named {name!r} (installed: {listed(known)})."
        f" Install a plugin that brings it, or write it: docs/plugins.md.{_about(manager).missing}"
    )


def find_dataset(manager: pluggy.PluginManager, name: str) -> Dataset:
    """Find a dataset by its name; UsageProblem lists what is installed."""
    return _find(manager, _DATASETS, name, kind="dataset")


def find_exporter(manager: pluggy.PluginManager, name: str) -> Exporter:
    """Find a target of `export` by its name; UsageProblem lists what is installed."""
    return _find(manager, _EXPORTERS, name, kind="export target")


def list_plugins(manager: pluggy.PluginManager) -> list[PluginEntry]:
    """Everything the installed plugins bring, with the distribution it came in."""
    entries = [
        _entry(manager, each, kind=registry.kind)
        for registry in _REGISTRIES
        for several in _by_name(manager, registry).values()
        for each in several
    ]
    return sorted(entries, key=lambda entry: (entry.kind, entry.name))


def _entry(manager: pluggy.PluginManager, brought: _Brought[Any], *, kind: str) -> PluginEntry:
    item, source = brought.item, _about(manager).sources.get(brought.plugin)
    text = item.help if kind != "architecture" else f"reads model_type {listed(item.model_types)}"
    return PluginEntry(
        name=item.name,
        kind=kind,
        plugin=brought.plugin,
        distribution=source.distribution if source else "(not installed)",
        version=source.version if source else "",
        help=text,
    )
