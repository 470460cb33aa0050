"""Objects inside a row, read as rows themselves: an error in one names its place."""

from dataclasses import replace

from qlora_pipe.rows import Row, kind_of


def nested_row(row: Row, name: str) -> Row:
    """Give a field that must be an object as a row, whose origin is `FILE:LINE: NAME`."""
    return _as_row(row, name, _field(row, name))


def nested_rows(row: Row, name: str) -> list[Row]:
    """Give the objects of a field that must be an array as rows, whose origins are `FILE:LINE: NAME[INDEX]`."""
    items = _field(row, name)
    if not isinstance(items, list):
        row.refuse(name, f"is {kind_of(items)}, not an array")
    return [_as_row(row, f"{name}[{index}]", item) for index, item in enumerate(items)]


def _field(row: Row, name: str) -> object:
    if not row.has(name):
        # Never text: this says that the field is missing, and which there are.
        row.text(name)
    return row.fields[name]


def _as_row(row: Row, name: str, item: object) -> Row:
    if not isinstance(item, dict):
        row.refuse(name, f"is {kind_of(item)}, not an object")
    return replace(row, fields=item, origin=f"{row.origin}: {name}")
