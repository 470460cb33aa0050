"""Which files of a folder or a Hub repository hold the rows that were asked for."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from qlora_pipe.dataset import HubFiles
from qlora_pipe.errors import DataError, UsageProblem
from qlora_pipe.rows import TABLES
from qlora_pipe.rows.folder import has_ending
from qlora_pipe.rows.packed_file import unpacked_name
from qlora_pipe.settings import did_you_mean

# What files of a split call it, by the name that it goes by.
_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# JSON that describes a dataset and holds none of its rows.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def split_files(names: Sequence[str], known: HubFiles, *, split: str | None, what: str) -> list[str]:
    """Choose the files of a split by the dataset's own globs, or else by the words in their names.

    No split means the first that the dataset names, or `train`. UsageProblem where there is no such split, DataError
    where the files cannot be one set of rows: in several folders, or of several kinds. `what` names them in errors.
    """
    if not known.splits:
        return _by_words(names, split=split or "train", what=what)
    wanted = split or next(iter(known.splits))
    if wanted not in known.splits:
        raise UsageProblem(f"{what} has no split {wanted!r}{did_you_mean(wanted, known.splits)}.")
    chosen = [name for name in sorted(names) if any(fnmatchcase(name, glob) for glob in known.splits[wanted])]
    if not chosen:
        raise DataError(f"{what} holds no file of the split {wanted!r} ({', '.join(known.splits[wanted])})")
    return chosen


def _by_words(names: Sequence[str], *, split: str, what: str) -> list[str]:
    tables = [name for name in sorted(names) if has_ending(name, TABLES) and name not in _DESCRIPTIONS]
    if not tables:
        raise DataError(f"{what} holds no file that ends in {', '.join(TABLES)}")
    splits = {name: _split_of(name, asked=split) for name in tables}
    chosen = [name for name in tables if splits[name] == split]
    if not chosen:
        raise UsageProblem(f"{what} has no split {split!r}{did_you_mean(split, dict.fromkeys(splits.values()))}.")
    folders = sorted({name.rpartition("/")[0] for name in chosen})
    if len(folders) > 1:
        raise DataError(
            f"{what} holds its split {split!r} in several folders ({', '.join(map(repr, folders))}), which may be"
            " several sets of rows: name one of them after the repository, hub:USER/NAME/FOLDER, or as the path"
        )
    endings = sorted({"." + unpacked_name(name).rpartition(".")[2] for name in chosen})
    if len(endings) > 1:
        raise DataError(
            f"{what} holds its split {split!r} as {' and '.join(endings)}, which may be the same rows again:"
            " fetch the files that you want and name their folder"
        )
    return chosen


def _split_of(name: str, *, asked: str) -> str:
    """The split that a file's name speaks of, the last word first; `train` where it speaks of none."""
    for word in _words(name):
        if word == asked:
            return asked
        for split, words in _WORDS.items():
            if word in words:
                return split
    return "train"


def _words(name: str) -> Iterator[str]:
    yield from reversed(re.split(r"[^a-z0-9]+", unpacked_name(name.lower()).rpartition(".")[0]))
