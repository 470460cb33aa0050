"""`qlora-pipe merge`."""

from pathlib import Path
from typing import Any

import click

from qlora_pipe.cli.options import FOLDER, config_of, options_of
from qlora_pipe.config import MergeConfig


@click.command()
@click.argument("base")
@click.argument("adapter")
@click.argument("out", type=FOLDER)
@options_of(MergeConfig)
def merge(base: str, adapter: str, out: Path, **settings: Any) -> None:
    """Add ADAPTER into BASE and write a plain checkpoint to the folder OUT.

    Give the store the adapter was trained on: its dequantised weights plus the adapter are what was trained. Given
    the original 16-bit checkpoint, the adapter is added to that instead, which is another model; a note says so.
    ADAPTER may be a run's folder.
    """
    from qlora_pipe.artifacts import Adapter, open_model
    from qlora_pipe.cli.console import Console
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.merge import merge as stage

    config = config_of(MergeConfig, settings, where="merge")
    with Console() as console:
        done = stage(
            open_model(base, load=config.load, note=console.note), Adapter.open(adapter, load=config.load), out, config,
            manager=load_plugins(console), progress=console.transfer, note=console.note,
        )  # fmt: skip
    click.echo(f"{out}: {done.summary}")
