"""`qlora-pipe plugins`."""

import dataclasses
import json

import click

from qlora_pipe.plugins import list_plugins, load_plugins


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def plugins(as_json: bool) -> None:
    """List what the installed plugins bring: architectures, datasets and export targets."""
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
