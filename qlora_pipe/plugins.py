"""Find and load plugins: each call of load_plugins gives a fresh manager, so there is no global to restore."""

import importlib.metadata
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pluggy

from qlora_pipe import hookspecs
from qlora_pipe.architecture import Architecture
from qlora_pipe.dataset import Dataset
from qlora_pipe.errors import ConfigError, UsageProblem
from qlora_pipe.exporter import Exporter


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginEntry:
    """One thing a plugin brings: a row of `qlora-pipe plugins`."""

    name: str
    kind: str
    plugin: str
    distribution: str
    version: str
    help: str


def load_plugins(*extra: object) -> pluggy.PluginManager:
    """Load every installed plugin and the given objects into a fresh manager.

    Built-in plugins come through the entry points like anyone's. A plugin that raises while it is imported is named on
    stderr and passed over; one that misspells a hook is a ConfigError. QLORA_PIPE_TRACE=1 prints each hook call.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if os.environ.get("QLORA_PIPE_TRACE") == "1":
        manager.trace.root.setwriter(lambda text: print(text, end="", file=sys.stderr))  # noqa: T201
        manager.enable_tracing()
    for point in sorted(importlib.metadata.entry_points(group=hookspecs.PROJECT), key=lambda p: p.name):
        if manager.get_plugin(point.name) is not None:
            continue
        try:
            module = point.load()
        except (Exception, SystemExit) as fault:
            # A stranger's broken plugin must not take the others with it.
            said = f"{type(fault).__name__}: {fault}"
            print(f"note: plugin {point.name!r} ({point.value}) was passed over, {said}", file=sys.stderr)  # noqa: T201
            continue
        manager.register(module, name=point.name)
    for plugin in extra:
        manager.register(plugin)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as fault:
        raise ConfigError(f"a plugin implements a hook that does not exist: {fault}. See docs/plugins.md.") from fault
    return manager


def _gather(results: Iterable[Iterable[T]], *, kind: str) -> dict[str, T]:
    """Join what the plugins returned, refusing two things of one name."""
    found: dict[str, T] = {}
    # pluggy calls the last registered first; the listing should not depend on that.
    for item in sorted((item for result in results for item in result), key=lambda item: item.name):
        if item.name in found:
            raise ConfigError(f"two plugins bring the {kind} {item.name!r}: uninstall one of them.")
        found[item.name] = item
    return found


def architectures(manager: pluggy.PluginManager) -> dict[str, Architecture]:
    """Every model family that is installed, by its name."""
    return _gather(manager.hook.register_architectures(), kind="architecture")


def datasets(manager: pluggy.PluginManager) -> dict[str, Dataset]:
    """Every dataset that is installed, by its name."""
    return _gather(manager.hook.register_datasets(), kind="dataset")


def exporters(manager: pluggy.PluginManager) -> dict[str, Exporter]:
    """Every target of `export` that is installed, by its name."""
    return _gather(manager.hook.register_exporters(), kind="exporter")


def find_architecture(
    manager: pluggy.PluginManager, model_type: object, *, config: Mapping[str, Any] | None = None
) -> Architecture:
    """Find the family that reads a config's `model_type`; ConfigError lists what is installed.

    With the whole config, plugins are also asked for a family made for it, where none is registered.
    """
    known = architectures(manager)
    for architecture in known.values():
        if model_type in architecture.model_types:
            return architecture
    made: Architecture | None = None if config is None else manager.hook.find_architecture(config=config)
    if made is not None:
        return made
    types = sorted(model_type for family in known.values() for model_type in family.model_types)
    raise ConfigError(
        f"no installed plugin reads model_type {model_type!r} (installed: {', '.join(types) or 'none'})."
        " Install one, or write it: docs/plugins.md; qlora-pipe[transformers] trains most others."
    )


def _find(known: dict[str, T], name: str, *, kind: str) -> T:
    if name in known:
        return known[name]
    raise UsageProblem(
        f"there is no {kind} named {name!r} (installed: {', '.join(known) or 'none'})."
        " Install a plugin that brings it, or write it: docs/plugins.md."
    )


def find_dataset(manager: pluggy.PluginManager, name: str) -> Dataset:
    """Find a dataset by its name; UsageProblem lists what is installed."""
    return _find(datasets(manager), name, kind="dataset")


def find_exporter(manager: pluggy.PluginManager, name: str) -> Exporter:
    """Find a target of `export` by its name; UsageProblem lists what is installed."""
    return _find(exporters(manager), name, kind="export target")


def list_plugins(manager: pluggy.PluginManager) -> list[PluginEntry]:
    """Everything the installed plugins bring, with the distribution it came in."""
    owners = {
        id(sys.modules.get(point.module)): point.dist
        for point in importlib.metadata.entry_points(group=hookspecs.PROJECT)
    }
    entries: list[PluginEntry] = []
    registered = (
        ("architecture", "register_architectures"),
        ("dataset", "register_datasets"),
        ("exporter", "register_exporters"),
    )
    for plugin_name, plugin in manager.list_name_plugin():
        owner = owners.get(id(plugin))
        for kind, hook in registered:
            implementation = getattr(plugin, hook, None)
            for item in implementation() if implementation else []:
                entries.append(_entry(item, kind=kind, plugin=plugin_name, owner=owner))
    return sorted(entries, key=lambda entry: (entry.kind, entry.name))


def _entry(item: Any, *, kind: str, plugin: str, owner: importlib.metadata.Distribution | None) -> PluginEntry:
    text = item.help if kind != "architecture" else f"reads model_type {', '.join(item.model_types)}"
    return PluginEntry(
        name=item.name,
        kind=kind,
        plugin=plugin,
        distribution=owner.name if owner else "(not installed)",
        version=owner.version if owner else "",
        help=text,
    )
