"""Confined work, for tests: what becomes of many pickles, one after the other, in one process.

Starting a process with torch takes seconds, and a file milliseconds. Each file goes through what the product does.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

from qlora_pipe.confined import pickles
from qlora_pipe.confined.ending import Refused
from qlora_pipe.confined.worker import Work, Write, ran_out_of_memory


def prepare(request: dict[str, Any], file: BinaryIO | None) -> Work:
    """Read the files of a folder while files can be opened."""
    pickles.rehearse()
    files = {path.name: path.read_bytes() for path in sorted(Path(request["folder"]).iterdir())}
    return lambda write: _convert_all(files, write)


def _convert_all(files: dict[str, bytes], write: Write) -> None:
    for name, data in files.items():
        write(json.dumps({"name": name, **_outcome(data)}).encode() + b"\n")


def _outcome(data: bytes) -> dict[str, str]:
    result = io.BytesIO()
    try:
        pickles.convert(io.BytesIO(data), data, result.write)  # type: ignore[arg-type]
    except Refused as refusal:
        return {"refused": str(refusal)}
    except BaseException as fault:
        return {"failed": "memory" if ran_out_of_memory(fault) else repr(fault)}
    return {"written": base64.b64encode(result.getvalue()).decode()}
