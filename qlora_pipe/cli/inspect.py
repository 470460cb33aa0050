"""`qlora-pipe inspect`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    tables = [found.pop("blocks", []), found.pop("tensors", [])]
    lines = [*_leaves(found)]
    width = max(len(key) for key, _ in lines)
    for key, value in lines:
        click.echo(f"{key:{width}}  {value}")
    for table in tables:
        for line in _table(table):
            click.echo(line)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Align rows under the keys of the fullest one."""
    if not rows:
        return
    columns = [*max(rows, key=len)]
    cells = [[column.replace("_", " ") for column in columns]]
    cells += [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    yield ""
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
