"""What lies where a folder is to be written: nothing, the finished folder itself, or something else. Read only."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_formats.errors import CommitError, FormatError
from qlora_formats.manifest import Manifest, difference
from qlora_formats.strict_json import normal

_MIB = 2**20


def partial_path(target: Path) -> Path:
    """Where `target` grows until it is finished."""
    return target.with_name(f".{target.name}.partial")


def finished(target: Path, *, kind: str, inputs: Mapping[str, Any]) -> Manifest | None:
    """The manifest of `target` if it was already finished from these inputs, None if nothing lies there.

    CommitError "conflict", naming the difference, where anything else does.
    """
    if not os.path.lexists(target):
        return None
    try:
        manifest = Manifest.read_if_present(target)
    except FormatError as error:
        raise CommitError(f"{target} is in the way: {error}", reason="conflict") from error
    if manifest is None:
        raise CommitError(
            f"{target} already exists and is no finished folder of qlora-pipe: choose another name or move it away",
            reason="conflict",
        )
    unlike = difference({"kind": manifest.kind, **manifest.inputs}, {"kind": kind, **normal(inputs)})
    if unlike:
        raise CommitError(
            f"{target} was made from other inputs or settings: {unlike}; choose another name or delete it",
            reason="conflict",
        )
    return manifest


def refuse_existing(target: Path) -> None:
    """CommitError "conflict" if anything bears the name `target`."""
    if os.path.lexists(target):
        raise CommitError(f"{target} already exists: choose another name or move it away", reason="conflict")


def require_space(target: Path, *, needed: int) -> None:
    """CommitError "disk" unless the file system that `target` will lie on has `needed` bytes free."""
    free = free_bytes(target)
    if free < needed:
        raise CommitError(
            f"{target} needs about {needed / _MIB:,.0f} MiB and {free / _MIB:,.0f} MiB are free there:"
            " make room or choose another disk",
            reason="disk",
        )


def free_bytes(path: Path) -> int:
    """Bytes free on the file system of `path`, which need not exist yet."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
