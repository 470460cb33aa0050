"""Rows as files of each kind that tables come in."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard


def write_table(path: Path, rows: list[Any]) -> Path:
    """Write rows as a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    else:
        path.write_bytes(lines if path.suffix == ".jsonl" else json.dumps(rows, indent=1).encode())
    return path
