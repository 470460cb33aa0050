"""`qlora-pipe verify`."""

import json

import click


@click.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(path: str, as_json: bool) -> int:
    """Check every byte of PATH, a store, a checkpoint, an adapter or a run (a folder or Hub id), by its checksums.

    All that is damaged is named: the file and, in a store, the weight. Exits with 65 then. A folder that another
    program wrote has no checksums; its headers, index and config are checked, and the scales of its 4-bit weights.
    """
    from qlora_pipe.cli.console import Console
    from qlora_pipe.stages.verify import verify as stage

    with Console() as console:
        found = stage(path, progress=console.transfer)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2, sort_keys=True))
        return 0 if found.ok else 65
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    for sentence in found.damage:
        click.echo(f"error: {sentence}", err=True)
    if found.ok:
        click.echo(f"{path}: {found.summary}")
    return 0 if found.ok else 65
