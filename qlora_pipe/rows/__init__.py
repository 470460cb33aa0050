"""Read data files strictly, a row at a time: every fault names file, line and field.

Dataset plugins read their rows with this. It imports neither torch nor a tokenizer; the libraries behind parquet and
.zst only where such a file is read.
"""

from qlora_pipe.rows.json_rows import json_array, json_lines, json_rows
from qlora_pipe.rows.parquet import parquet_rows
from qlora_pipe.rows.plain_text import documents
from qlora_pipe.rows.row import LONE_SURROGATE, MAX_ROW_BYTES, BadRow, Row, kind_of
from qlora_pipe.rows.separated import csv_rows, separated_rows
from qlora_pipe.rows.tables import TABLES, table_rows

ROWS_VERSION = 1
"""Changes whenever the same bytes would become other rows."""

__all__ = [
    "LONE_SURROGATE",
    "MAX_ROW_BYTES",
    "ROWS_VERSION",
    "TABLES",
    "BadRow",
    "Row",
    "csv_rows",
    "documents",
    "json_array",
    "json_lines",
    "json_rows",
    "kind_of",
    "parquet_rows",
    "separated_rows",
    "table_rows",
]
