"""Rows of parquet files, read with pyarrow (the extra `data`) a few at a time."""

import base64
import datetime
import decimal
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.rows.folder import data_files
from qlora_pipe.rows.packed_file import PACKED
from qlora_pipe.rows.row import MAX_ROW_BYTES, TOO_LONG, BadRow, Row, quoted

_ROWS_AT_ONCE = 256
_READ_BYTES = 1 << 20


def parquet_rows(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of parquet files; `file:row N` is a row's origin, counted from 1.

    Lists and structs become arrays and objects, dates and decimals their text, bytes their base64. ConfigError where
    pyarrow is missing, DataError where a file is none of parquet's or damaged.
    """
    for file, name in data_files(path, (".parquet",)):
        yield from read_parquet(file, name)


def read_parquet(path: Path, name: str) -> Iterator[Row | BadRow]:
    """As `parquet_rows`, of one file that errors call `name`."""
    if name.endswith(PACKED):
        raise DataError(f"{name}: a parquet file is packed inside and is not read from a packed one: unpack it")
    try:
        import pyarrow  # noqa: PLC0415  an extra of 150 MB, and only for these files
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as fault:
        raise ConfigError(f"{name} is read by the pyarrow library: pip install 'qlora-pipe[data]'") from fault
    number = 0
    try:
        # Read in pieces, and nothing ahead: else the columns of a row group, which may be all there is, lie in memory.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
            _check_names(file.schema_arrow.names, name)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
                for row in _values(batch):
                    number += 1
                    yield row_of_values(row, origin=f"{name}:row {number}")
    except (pyarrow.ArrowException, OSError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise DataError(f"{name} cannot be read as parquet after row {number}: {reason}") from fault


def _check_names(names: list[str], name: str) -> None:
    for place, column in enumerate(names):
        if names.index(column) != place:
            raise DataError(f"{name}: two columns are named {quoted(column)}")


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Each row of a batch, or what is wrong with it: only then are the others asked for one by one."""
    try:
        yield from batch.to_pylist()
        return
    except (UnicodeDecodeError, ValueError, OverflowError):
        pass
    for number in range(batch.num_rows):
        try:
            (row,) = batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as fault:
            yield f"a text is not UTF-8: its byte {fault.start + 1} is 0x{fault.object[fault.start]:02x}"
        except (ValueError, OverflowError) as fault:
            yield f"a value cannot be read: {' '.join(str(fault).split())[:200]}"
        else:
            yield row


def row_of_values(values: dict[str, Any] | str, *, origin: str) -> Row | BadRow:
    """Make a row of the values that a library gives, or a bad one of what is wrong with it."""
    if isinstance(values, str):
        return BadRow(reason=f"{origin}: {values}", raw=b"")
    fields = {column: _json_value(value) for column, value in values.items()}
    raw = json.dumps(fields, ensure_ascii=False).encode(errors="replace")
    if len(raw) > MAX_ROW_BYTES:
        return BadRow(reason=f"{origin}: {TOO_LONG}", raw=raw[:MAX_ROW_BYTES])
    return Row(fields=fields, origin=origin, raw=raw)


def _json_value(value: Any) -> Any:
    match value:
        case None | bool() | str() | int() | float():
            return value
        case dict():
            return {str(key): _json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_value(item) for item in value]
        case bytes():
            return base64.b64encode(value).decode()
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal():
            return str(value)
        case _:
            return str(value)
