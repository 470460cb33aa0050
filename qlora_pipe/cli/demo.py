"""`qlora-pipe demo`."""

from pathlib import Path

import click

from qlora_pipe.cli.options import FOLDER


@click.command()
@click.option("--out", type=FOLDER, default=Path("qlora-demo"), show_default=True, help="Folder for what it makes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the fine-tunes.")
def demo(out: Path, seed: int) -> None:
    """Run the whole chain on a tiny model that comes with the package: about a minute on a CPU, no network.

    Quantizes the model, fine-tunes 16-bit LoRA and NF4 QLoRA adapters on a skill it lacks, merges, and marks held-out
    answers before and after.
    """
    from qlora_pipe.cli.console import Console
    from qlora_pipe.demo.chain import STEPS, run_demo
    from qlora_pipe.plugins import load_plugins

    with Console(steps=STEPS) as console:
        for line in run_demo(out, seed=seed, manager=load_plugins(console), note=console.note):
            click.echo(line)
