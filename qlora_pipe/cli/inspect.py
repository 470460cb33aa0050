"""`qlora-pipe inspect`."""

import json

import click


@click.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(path: str, as_json: bool) -> None:
    """Say what PATH is: a store, a checkpoint, an adapter or a run; its tensors, sizes, settings and source."""
    from qlora_pipe.stages.inspect import inspect as stage

    found = stage(path)
    if as_json:
        click.echo(json.dumps(found, indent=2, sort_keys=True))
        return
    for key, value in found.items():
        if key != "tensors":
            click.echo(f"{key:16} {json.dumps(value) if isinstance(value, dict | list) else value}")
    for tensor in found.get("tensors", []):
        click.echo("  " + "  ".join(str(value) for value in tensor.values()))
