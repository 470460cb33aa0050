"""`qlora-pipe generate`."""

from typing import Any

import click

from qlora_pipe.cli.options import config_of, options_of
from qlora_pipe.config import GenerateConfig


@click.command()
@click.argument("model")
@click.option("--adapter", help="LoRA adapter to put on the model: a folder, a run or a Hub id.")
@click.option(
    "--prompt",
    required=True,
    help="Text to continue after the tokenizer's BOS, or for an encoder-decoder to answer, fed as it is; with --chat,"
    " what a user says.",
)
@options_of(GenerateConfig)
def generate(model: str, adapter: str | None, prompt: str, **settings: Any) -> None:
    """Continue a prompt with MODEL, a 4-bit store or a 16-bit checkpoint (a folder or Hub id).

    Prints the continuation alone. Greedy unless --temperature is above 0 or --beams above 1.
    """
    from qlora_pipe.artifacts import Adapter, open_model
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.generate import continue_text

    config = config_of(GenerateConfig, settings, where="generate")

    def note(sentence: str) -> None:
        click.echo(f"note: {sentence}", err=True)

    base = open_model(model, load=config.load, note=note)
    trained = Adapter.open(adapter, load=config.load) if adapter else None
    pieces = continue_text(base, prompt, config, manager=load_plugins(), adapter=trained, note=note)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
