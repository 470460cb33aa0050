"""Export: send a finished folder to a named target."""

from collections.abc import Callable
from pathlib import Path

import pluggy

from qlora_formats.manifest import Manifest
from qlora_pipe.artifacts import Binding
from qlora_pipe.config import ExportConfig
from qlora_pipe.plugins import find_exporter


def export(
    path: Path, config: ExportConfig, *, manager: pluggy.PluginManager, note: Callable[[str], None] = lambda _: None
) -> str:
    """Push `path`, an adapter, a store, a merged checkpoint or a run, to the target `config.to`; say where it is.

    `note` takes a sentence on a store that is of little use by itself. Raises UsageProblem for an unknown target,
    MissingInputError for an unfinished folder, NetworkError where the target does not answer.
    """
    exporter = find_exporter(manager, config.to)
    if Binding.of(Manifest.read_if_present(path)) is not None:
        note(f"{path.name} was quantised for an adapter and stands for the model only with it: publish that, too.")
    return exporter.push(path, config)
