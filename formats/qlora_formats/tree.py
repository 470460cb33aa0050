"""Small files in folders of their own, written so that all of them appear at once or none."""

from collections.abc import Mapping
from pathlib import Path

from qlora_formats import disk
from qlora_formats.commit import write_file
from qlora_formats.errors import CommitError
from qlora_formats.journal import temporary
from qlora_formats.target import partial_path, refuse_existing


def write_tree(target: Path, files: Mapping[str, bytes]) -> None:
    """Write the folder `target` with these files, named by their paths in it; it gets its name when all are there.

    A partial folder that an interrupted call left is written over. Raises CommitError: "conflict" if the target exists,
    or the partial folder holds something else than these files, "disk" where the system refuses.
    """
    refuse_existing(target)
    partial = partial_path(target)
    paths = {partial / name for name in files}
    known = paths | {temporary(path) for path in paths}
    strays = sorted(path for path in partial.rglob("*") if path not in known and not path.is_dir())
    if strays:
        raise CommitError(f"{strays[0]} is in the way: move {partial} away and run again", reason="conflict")
    for name, data in sorted(files.items()):
        write_file(partial / name, data)
    for folder in sorted({path.parent for path in paths}):
        disk.fsync_path(folder)
    refuse_existing(target)
    disk.rename(partial, target)
