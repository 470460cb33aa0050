"""`qlora-pipe run`."""

from pathlib import Path

import click

from qlora_pipe.cli.options import FOLDER


@click.command()
@click.argument("pipeline", type=FOLDER)
def run(pipeline: Path) -> None:
    """Run the stages that PIPELINE, a YAML file, lists: quantize, finetune, merge, export.

    A stage whose output was already made from the same inputs and settings is passed over.
    """
    from qlora_pipe.cli.console import Console
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.run import run_pipeline

    with Console() as console:
        for line in run_pipeline(pipeline, manager=load_plugins(console), progress=console.transfer, note=console.note):
            click.echo(line)
