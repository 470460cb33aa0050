"""The export target tarball: the folder as one file beside it."""

import shutil
from pathlib import Path

from qlora_pipe.config import ExportConfig
from qlora_pipe.exporter import Exporter
from qlora_pipe.hookspecs import hookimpl


def push(path: Path, config: ExportConfig) -> str:  # noqa: ARG001
    """Send a finished folder to the target; a line that says where it is now."""
    whole = path.absolute()
    return shutil.make_archive(str(whole), "tar", root_dir=whole.parent, base_dir=whole.name)


EXPORTER = Exporter(name="tarball", help="one file beside the folder", push=push)


@hookimpl
def register_exporters() -> list[Exporter]:
    """Bring the target."""
    return [EXPORTER]
