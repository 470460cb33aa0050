"""`qlora-pipe plugins`."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import click

from qlora_pipe.plugins import list_plugins, load_plugins
from qlora_pipe.skeleton import Kind


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
@click.pass_context
def plugins(context: click.Context, as_json: bool) -> None:
    """List what the installed plugins bring: architectures, datasets and export targets.

    A plugin that cannot be used is named on stderr, with the reason. `plugins new` begins one of your own.
    """
    if context.invoked_subcommand is not None:
        return
    entries = [dataclasses.asdict(entry) for entry in list_plugins(load_plugins())]
    if as_json:
        click.echo(json.dumps(entries, indent=2))
        return
    rows = [
        ("name", "kind", "distribution", "version", ""),
        *((e["name"], e["kind"], e["distribution"], e["version"], e["help"]) for e in entries),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[4]]).rstrip())


@plugins.command()
@click.argument("name")
@click.option(
    "--kind", type=click.Choice(get_args(Kind)), default="architecture", show_default=True, help="What it is to bring."
)
def new(name: str, kind: Kind) -> None:
    """Begin a plugin: write the distribution qlora-pipe-NAME, with its test, into the folder NAME.

    It works as it is: install it, run its test, then make it your own. docs/plugins.md goes on from there.
    """
    from qlora_pipe.skeleton.writing import write_plugin

    for file in write_plugin(name, kind=kind, inside=Path()):
        click.echo(f"{name}/{file}")
    click.echo(f"next: cd {name} && pip install -e '.[test]' && pytest", err=True)
