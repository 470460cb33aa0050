"""Deleting a finished folder: only what its manifest proves to be ours."""

from itertools import count
from pathlib import Path

from qlora_formats import disk
from qlora_formats.errors import CommitError
from qlora_formats.manifest import MANIFEST, Manifest
from qlora_formats.strict_json import MAX_BYTES, read_bytes

_DISCARDED = ".discarded"


def remove_folder(folder: Path) -> None:
    """Delete a finished folder, such as a checkpoint that newer ones replace.

    CommitError "conflict" where it holds files that its manifest does not name. The folder loses its name first, so
    that it is never seen half-deleted; the next call for a folder beside it clears what a crash left over.
    """
    _names_to_delete(folder, Manifest.read(folder))
    for discarded in sorted(folder.parent.glob(f".*{_DISCARDED}")):
        if _is_ours(discarded):
            _delete(discarded)
    disk.rename(folder, _discarded(folder))
    _delete(_discarded(folder))


def finish_removal(folder: Path) -> None:
    """Clear what a crash left of an earlier `remove_folder(folder)`, if anything."""
    if _is_ours(_discarded(folder)):
        _delete(_discarded(folder))


def _discarded(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_DISCARDED}")


def _is_ours(discarded: Path) -> bool:
    # The manifest goes last: without it nothing else of ours is left.
    return (discarded / MANIFEST).is_file() or (discarded.is_dir() and not any(discarded.iterdir()))


def _delete(folder: Path) -> None:
    path = folder / MANIFEST
    if path.is_file():
        manifest = Manifest.parse(read_bytes(path, limit=MAX_BYTES), what=str(path))
        for name in _names_to_delete(folder, manifest):
            disk.remove(folder / name)
        # The manifest goes last: it proves that the rest is ours.
        disk.remove(path)
    disk.remove_empty_folder(folder)


def _names_to_delete(folder: Path, manifest: Manifest) -> list[str]:
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    strays = sorted(present - manifest.files.keys())
    if strays:
        raise CommitError(
            f"{folder} is not deleted: it also holds {strays[0]!r}, which its {MANIFEST} does not name",
            reason="conflict",
        )
    return sorted(present)


def set_aside(folder: Path) -> Path:
    """Give a damaged folder another name, `NAME.damaged` or the next free `NAME.damaged-2`, and return it."""
    names = (f"{folder.name}.damaged" + (f"-{number}" if number > 1 else "") for number in count(1))
    target = next(path for path in map(folder.with_name, names) if not path.exists())
    disk.rename(folder, target)
    return target
