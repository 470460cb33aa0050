"""Rows of data files that only the library `datasets` reads (the extra `data`), from a folder that holds them."""

from collections.abc import Iterator
from pathlib import Path

from qlora_pipe.errors import ConfigError, DataError, UsageProblem
from qlora_pipe.rows.parquet import row_of_values
from qlora_pipe.rows.row import BadRow, Row


def library_rows(folder: Path, *, split: str) -> Iterator[Row | BadRow]:
    """Yield the rows of a split as the library finds it in the folder's files; `folder:row N` is a row's origin.

    The library runs no code of the folder (its versions from 4 on have no way to). ConfigError where it is missing,
    DataError where it can't read the files, UsageProblem where it finds no such split.
    """
    try:
        import datasets  # noqa: PLC0415  an extra that takes seconds to import, and only for these files
    except ImportError as fault:
        raise ConfigError(f"{folder.name} is read by the datasets library: pip install 'qlora-pipe[data]'") from fault
    number = 0
    # The library raises as many kinds of error as there are kinds of files.
    try:
        splits = datasets.load_dataset(str(folder), streaming=True)
        if split not in splits:
            raise UsageProblem(f"{folder.name} has no split {split!r} (there are: {', '.join(splits)})")
        for values in splits[split]:
            number += 1
            yield row_of_values(values, origin=f"{folder.name}:row {number}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise DataError(f"{folder.name} cannot be read by the datasets library after row {number}: {reason}") from fault
