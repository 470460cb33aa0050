"""The data files that a path stands for: itself, or those of a folder in the order of their names."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_pipe.errors import DataError
from qlora_pipe.rows.packed_file import unpacked_name


def data_files(path: Path, endings: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yield each file with its name as errors give it: one file whatever its name, or a folder's with such endings.

    Folders in it are looked through as well; hidden files are passed over. DataError where there is none.
    """
    if not path.is_dir():
        yield path, path.name
        return
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    fitting = [name for name in names if has_ending(name, endings)]
    if not fitting:
        raise DataError(f"{path} holds no file that ends in {' or '.join(endings)}")
    for name in fitting:
        yield path / name, name


def has_ending(name: str, endings: Sequence[str]) -> bool:
    """Whether a file of this name, packed or not, ends so and is not hidden."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and unpacked_name(name.lower()).endswith(tuple(endings))
