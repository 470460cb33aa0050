"""What an exporter plugin says: a named target of `qlora-pipe export`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_pipe.config import ExportConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Exporter:
    """A named target: `push` sends a finished folder there and returns a line that says where it is."""

    name: str
    help: str
    push: Callable[[Path, ExportConfig], str]
