"""Take in plugins one by one; a stranger's that is broken is named and passed over, and takes no other with it.

Built-in plugins come through the entry points like anyone's, and are imported at once. Others are tried out in
processes of their own first (plugin_probe.py).
"""

import contextlib
import difflib
import importlib.metadata
import io
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from importlib.metadata import EntryPoint
from typing import NamedTuple

import pluggy

from qlora_pipe import hookspecs
from qlora_pipe.errors import ConfigError
from qlora_pipe.plugin_probe import probe, said_of

_BUILT_IN = "qlora_plugins"
_OURS = ("qlora_pipe", "qlora_formats", "qlora_kernels", _BUILT_IN)
_SECONDS = 20.0
_LONGEST_PRINT = 60
_built_ins_alone: ContextVar[bool] = ContextVar("built_ins_alone", default=False)


@contextlib.contextmanager
def built_ins_alone() -> Iterator[None]:
    """Let load_plugins, in this block, leave out every plugin that did not come with qlora_pipe."""
    token = _built_ins_alone.set(True)
    try:
        yield
    finally:
        _built_ins_alone.reset(token)


class Source(NamedTuple):
    """Where a plugin comes from."""

    distribution: str
    version: str
    built_in: bool

    @classmethod
    def of(cls, point: EntryPoint) -> "Source":
        """Say which distribution an entry point belongs to."""
        owner = point.dist
        built_in = _package(point.module) == _BUILT_IN
        return cls(owner.name, owner.version, built_in) if owner else cls("(unknown)", "", built_in)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


class Plugins(pluggy.PluginManager):
    """The plugins of one command, and what is wrong with those that were passed over."""

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.add_hookspecs(hookspecs)
        self.sources: dict[str, Source] = {}
        """By plugin, where it was installed from; those handed over as objects are not in it."""
        self.left_out = False
        """Whether plugins of others were left out, unseen."""
        self._faults: list[str] = []
        self._noted: set[str] = set()

    def take(self, plugin: object) -> None:
        """Take in an object that was handed over; ConfigError where its hooks are wrong."""
        if self.is_registered(plugin):
            # The author's own, installed and handed over in a test.
            return
        fault = self._registered(plugin, None)
        if fault is not None:
            raise ConfigError(f"the plugin {plugin!r} {fault}. See docs/plugins.md.")

    def install(self, point: EntryPoint) -> None:
        """Import an installed plugin and take it in; a broken one is passed over."""
        source = Source.of(point)
        if point.name in self.sources:
            other = self.sources[point.name]
            self.pass_over(point.name, source, f"another plugin of that name is there, of {other}")
            return
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                plugin = point.load()
        except (Exception, SystemExit) as fault:
            # A stranger's broken plugin must not take the others with it.
            self.pass_over(point.name, source, said_of(fault))
            return
        if (text := printed.getvalue().strip()) != "":
            shown = text if len(text) <= _LONGEST_PRINT else f"{text[:_LONGEST_PRINT]}..."
            self.note(f"{_named(point.name, source)} prints when it is imported: {shown!r}.")
        fault_of_hooks = self._registered(plugin, point.name) or self._hookless(plugin)
        if fault_of_hooks is not None:
            self.unregister(name=point.name)
            self.pass_over(point.name, source, f"it {fault_of_hooks}")
            return
        self.sources[point.name] = source

    def pass_over(self, name: str, source: Source, reason: str) -> None:
        """Remember why an installed plugin was left out, and say so."""
        fault = f"{_named(name, source)} ({reason})"
        if fault not in self._faults:
            self._faults.append(fault)
            self.note(f"{_named(name, source)} was passed over: {reason}.")

    def blame(self, name: str, reason: str) -> None:
        """Pass over what an installed plugin answered; ConfigError where it was handed over, or is ours."""
        source = self.sources.get(name)
        if source is None or source.built_in:
            raise ConfigError(f"plugin {name!r} {reason}. See docs/plugins.md.")
        self.pass_over(name, source, reason)

    def note(self, sentence: str) -> None:
        """Say a sentence on stderr, once."""
        if sentence not in self._noted:
            self._noted.add(sentence)
            print(f"note: {sentence}", file=sys.stderr)  # noqa: T201

    def described(self, name: str) -> str:
        """Name a plugin and where it comes from."""
        source = self.sources.get(name)
        return f"plugin {name!r}" if source is None else _named(name, source)

    @property
    def missing(self) -> str:
        """What to add where something is not found: the plugins that might have brought it, if any."""
        if self.left_out:
            return " Plugins of others were left out (--no-plugins)."
        return f" Passed over: {'; '.join(self._faults)}." if self._faults else ""

    def _registered(self, plugin: object, name: str | None) -> str | None:
        """Register a plugin; say what is wrong with its hooks, or None."""
        try:
            self.register(plugin, name=name)
        except (pluggy.PluginValidationError, ValueError) as fault:
            return f"implements a hook wrongly: {said_of(fault)}"
        for caller in self.get_hookcallers(plugin) or []:
            if not caller.has_spec() and not all(each.optionalhook for each in caller.get_hookimpls()):
                known = [name for name, each in vars(self.hook).items() if each.has_spec()]
                near = difflib.get_close_matches(caller.name, known, n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                return f"implements {caller.name!r}, a hook that does not exist{hint}"
        return None

    def _hookless(self, plugin: object) -> str | None:
        return None if self.get_hookcallers(plugin) else "implements no hook; mark its functions with hookimpl"


def install_all(plugins: Plugins) -> None:
    """Take in every installed plugin, the built-in ones first."""
    points = sorted(
        importlib.metadata.entry_points(group=hookspecs.PROJECT),
        key=lambda point: (not Source.of(point).built_in, point.name, str(Source.of(point))),
    )
    strangers = [point for point in points if not Source.of(point).built_in]
    if _built_ins_alone.get():
        plugins.left_out = bool(strangers)
        points, strangers = [point for point in points if point not in strangers], []
    # What is imported already has shown that it can be.
    untried = [point for point in strangers if point.module not in sys.modules]
    verdicts = probe(untried, seconds=_timeout()) if untried else {}
    for point in points:
        if (fault := verdicts.get(point)) is not None:
            plugins.pass_over(point.name, Source.of(point), fault)
        else:
            plugins.install(point)


def culprit(fault: BaseException) -> str | None:
    """Name the stranger's plugin whose code raised an error, or called what did; None where it was ours."""
    points = importlib.metadata.entry_points(group=hookspecs.PROJECT)
    strangers = {_package(point.module): point for point in points if not Source.of(point).built_in}
    frames = [frame for frame, _ in traceback.walk_tb(fault.__traceback__)]
    for frame in reversed(frames):
        package = _package(frame.f_globals.get("__name__", ""))
        if package in strangers:
            point = strangers[package]
            return _named(point.name, Source.of(point))
        if package in _OURS:
            return None
    return None


def _package(module: str) -> str:
    return module.partition(".")[0]


def _timeout() -> float:
    text = os.environ.get("QLORA_PIPE_PLUGINS_TIMEOUT", f"{_SECONDS}")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"QLORA_PIPE_PLUGINS_TIMEOUT is {text!r}; it must be a number of seconds above 0.")
    return seconds


def _named(name: str, source: Source) -> str:
    return f"plugin {name!r} of {source}"
