"""`qlora-pipe quantize`."""

from pathlib import Path
from typing import Any

import click

from qlora_pipe.cli.options import FOLDER, config_of, options_of
from qlora_pipe.config import QuantizeConfig


@click.command()
@click.argument("source")
@click.argument("out", type=FOLDER)
@options_of(QuantizeConfig)
def quantize(source: str, out: Path, **settings: Any) -> None:
    """Convert SOURCE, a 16-bit checkpoint (a folder or Hub id), into a 4-bit store in the folder OUT.

    The store is bitsandbytes' serialised layout: transformers and PEFT load it too. Run again after an
    interruption, it goes on where it stopped.
    """
    from qlora_pipe.cli.console import Console
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.quantize import quantize as stage
    from qlora_pipe.stages.unpickle import open_source

    config = config_of(QuantizeConfig, settings, where="quantize")
    with (
        Console() as console,
        open_source(source, out, config, progress=console.transfer, note=console.note) as checkpoint,
    ):
        done = stage(
            checkpoint, out, config, manager=load_plugins(console), progress=console.transfer, note=console.note
        )
    click.echo(f"{out}: {done.summary}")
    if done.adapter is not None:
        click.echo(f"{done.adapter.path}: {done.adapter.summary}")
