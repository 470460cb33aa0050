"""`qlora-pipe finetune`."""

from pathlib import Path
from typing import Any

import click

from qlora_pipe.cli.options import FOLDER, config_of, options_of
from qlora_pipe.config import FinetuneConfig
from qlora_pipe.errors import ConfigError, UsageProblem
from qlora_pipe.settings import read_yaml, take


@click.command()
@click.argument("base")
@click.option(
    "--data", metavar="NAME:PATH", help="Data to train on: alpaca:rows.json; from the Hub alpaca, or hub:USER/NAME."
)
@click.option("--out", type=FOLDER, help="Folder of the run; run again with the same one, it goes on.")
@options_of(FinetuneConfig)
def finetune(base: str, data: str | None, out: Path | None, **settings: Any) -> None:
    """Train a LoRA adapter on BASE: a 4-bit store (QLoRA) or a 16-bit checkpoint (LoRA), a folder or Hub id.

    BASE may also be a file run.yaml that holds base, data, out and any of the settings below; flags win over it. The
    adapter ends in OUT/final, in PEFT's layout. Stopped or killed, the same command goes on from the last checkpoint
    and ends with the same bytes.
    """
    from qlora_pipe.cli.console import Console
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.finetune import finetune as stage
    from qlora_pipe.train.request import FinetuneRequest

    base, data, out, config = resolve_request(base, data, out, settings)
    request = FinetuneRequest(base=base, data=data, out=out, config=config)
    with Console(steps=config.steps) as console:
        done = stage(request, manager=load_plugins(console), note=console.note, progress=console.count)
    click.echo(done.final_path)


def resolve_request(
    base: str, data: str | None, out: Path | None, settings: dict[str, Any]
) -> tuple[str, str, Path, FinetuneConfig]:
    """Join the command line with run.yaml, where one was given: base, data, out and the settings."""
    file: dict[str, Any] = {}
    where = "finetune"
    if base.endswith((".yaml", ".yml")):
        where = base
        file = read_yaml(Path(base))
        named = take(file, "base", where=where)
        if named is None:
            raise ConfigError(f"{where}: 'base' is missing: name the store or checkpoint to train on.")
        base = named
    in_file = {key: take(file, key, where=where) for key in ("data", "out")}
    data = data or in_file["data"]
    chosen = out or (Path(in_file["out"]) if in_file["out"] else None)
    if data is None or chosen is None:
        missing = "--data NAME:PATH" if data is None else "--out RUN"
        raise UsageProblem(f"finetune needs {missing}, on the command line or in run.yaml.")
    return base, data, chosen, config_of(FinetuneConfig, settings, file=file, where=where)
