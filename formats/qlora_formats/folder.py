"""What lies in a folder that a stranger may have made: files by plain names, and links that stay inside."""

import stat
from pathlib import Path

from qlora_formats.errors import FormatError


def is_plain_name(name: str) -> bool:
    """Whether `name` is the name of a file in a folder: no path, not hidden, printable, at most 255 bytes."""
    return name.isprintable() and not name.startswith(".") and "/" not in name and 0 < len(name.encode()) <= 255


def has_file(folder: Path, name: str) -> bool:
    """Whether the folder holds a file `name`.

    FormatError where that name belongs to something else: a folder, a pipe, a device, a link to nowhere, or one that
    leads out of the folder, since a stranger's folder must not name other files of this machine.
    """
    path = folder / name
    try:
        if stat.S_ISREG(path.lstat().st_mode):
            return True
        is_file = path.is_file()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    if not is_file:
        kind = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "a link to nothing"
        raise FormatError(f"{path} is {kind} where a file is needed: make or fetch it again")
    require_inside(folder, path)
    return True


def require_inside(folder: Path, path: Path) -> None:
    """FormatError if the file `path` is a link that leads out of the folder, but for those of the Hub's cache."""
    if not path.is_symlink():
        return
    inside = {folder.resolve()}
    if folder.resolve().parent.name == "snapshots":
        # The Hub's cache: snapshots/REVISION/NAME links to blobs/HASH.
        inside.add(folder.resolve().parent.parent / "blobs")
    if path.resolve().parent not in inside:
        raise FormatError(f"{path} is a link that leads out of its folder, to {path.resolve()}: copy the file there")
