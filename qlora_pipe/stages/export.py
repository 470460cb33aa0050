"""Export: send a finished folder to a named target."""

from pathlib import Path

import pluggy

from qlora_pipe.config import ExportConfig
from qlora_pipe.plugins import find_exporter


def export(path: Path, config: ExportConfig, *, manager: pluggy.PluginManager) -> str:
    """Push `path`, an adapter, a store, a merged checkpoint or a run, to the target `config.to`; say where it is.

    Raises UsageProblem for an unknown target, MissingInputError for an unfinished folder, NetworkError where the
    target does not answer.
    """
    return find_exporter(manager, config.to).push(path, config)
