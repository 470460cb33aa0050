"""`qlora-pipe export`."""

from pathlib import Path
from typing import Any

import click

from qlora_pipe.cli.options import FOLDER, config_of, options_of
from qlora_pipe.config import ExportConfig


@click.command()
@click.argument("path", type=FOLDER)
@options_of(ExportConfig)
def export(path: Path, **settings: Any) -> None:
    """Push PATH, an adapter, a store or a merged checkpoint, to a target such as the Hugging Face Hub."""
    from qlora_pipe.cli.console import Console
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.export import export as stage

    config = config_of(ExportConfig, settings, where="export")
    with Console() as console:
        where = stage(path, config, manager=load_plugins(console), note=console.note)
    click.echo(where)
