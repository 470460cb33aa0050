"""Unpickle: give a checkpoint whose weights are pickles (`pytorch_model.bin`) as one of safetensors, for a while.

The pickles are read in a confined process (qlora_pipe/confined/pickles.py) into a scratch folder, shard by shard,
which is checked like any stranger's folder and deleted when the caller has done what it wanted it for.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import torch

from qlora_formats.checkpoint import (
    CONFIG,
    INDEX,
    PICKLED_INDEX,
    PICKLED_WEIGHTS,
    WEIGHTS,
    CheckpointFolder,
    check_shard,
    read_index,
    shard_names,
    shard_path,
)
from qlora_formats.commit import PartialFolder, commit_folder
from qlora_formats.folder import require_inside
from qlora_formats.hashing import hash_files
from qlora_formats.header import MAX_HEADER_BYTES
from qlora_formats.removal import finish_removal, remove_folder
from qlora_formats.store import is_store
from qlora_formats.strict_json import pretty, read_object
from qlora_formats.target import finished, require_space
from qlora_formats.tensorfile import TensorFile
from qlora_pipe.artifacts import Checkpoint
from qlora_pipe.config import QuantizeConfig
from qlora_pipe.confined import Limits, run_confined
from qlora_pipe.confined.pickles import MAX_GROWTH
from qlora_pipe.errors import ConfigError, DataError, MissingInputError
from qlora_pipe.hub import Resolved, resolve
from qlora_pipe.model import note_network
from qlora_pipe.stages.adapter_init import adapter_folder

Progress = Callable[[str, int, int], None]

# The first torch that reads a pickle onto the meta device without its data.
OLDEST_TORCH = (2, 11)
ALLOWANCE_BYTES = 512 * 2**20
"""Memory of the confined process beside its libraries and the mapped file."""

_TASK = "qlora_pipe.confined.pickles"
_MIB = 2**20
# What the slowest disk and processor should manage, with room to spare, beside a minute for all the rest.
_SLOWEST_BYTES_PER_SECOND = 4 * _MIB
_PATIENCE_SECONDS = 60


class _Stamp(NamedTuple):
    """What changes when a file does."""

    device: int
    inode: int
    n_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        found = path.stat()
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, kw_only=True)
class Pickles:
    """A model folder whose weights are pickles, hashed and not yet read.

    `weight_map` is the index's, None where there is one file; `sha256` has the config and the pickles by name,
    `others` what else decides what becomes of them.
    """

    found: Resolved
    names: list[str]
    weight_map: Mapping[str, str] | None
    stamps: Mapping[str, _Stamp]
    sha256: Mapping[str, str]
    others: Mapping[str, str]

    @classmethod
    def at(cls, found: Resolved, *, progress: Progress) -> Self:
        """Check the folder's index and hash its files; FormatError or DataError where something is wrong with it."""
        path = found.path
        if not (path / CONFIG).is_file():
            raise DataError(f"{path} is not a model: it has no {CONFIG}.")
        if is_store(path):
            raise DataError(f"{path} is already a 4-bit checkpoint, and of those only safetensors are read.")
        index, weight_map = path / PICKLED_INDEX, None
        if (path / PICKLED_WEIGHTS).is_file():
            names = [PICKLED_WEIGHTS]
            require_inside(path, path / PICKLED_WEIGHTS)
        else:
            weight_map = read_index(index)
            names = sorted(set(weight_map.values()))
            for name in names:
                shard_path(index, name)
        stamps = {name: _Stamp.of(path / name) for name in names}
        hashes = hash_files(
            [path / name for name in (CONFIG, *names)],
            progress=lambda done, total: progress("hash pickles", done, total),
        )
        sha256 = {file.name: found_hash.sha256 for file, found_hash in hashes.items()}
        others = [*_beside(path).carried_files(), *([index] if weight_map is not None else [])]
        return cls(
            found=found,
            names=names,
            weight_map=weight_map,
            stamps=stamps,
            sha256=sha256,
            others={file.name: found_hash.sha256 for file, found_hash in hash_files(others).items()},
        )

    @property
    def unread(self) -> Checkpoint:
        """The checkpoint with its config and identity, and without a single weight."""
        path, repo, revision = self.found
        return Checkpoint(path, _beside(path), repo, revision, made_from=self.sha256)


def has_pickles_alone(folder: Path) -> bool:
    """Whether a folder's weights are pickles; where there are safetensors too, those are taken."""
    present = {name for name in (WEIGHTS, INDEX, PICKLED_WEIGHTS, PICKLED_INDEX) if (folder / name).is_file()}
    return bool(present) and present <= {PICKLED_WEIGHTS, PICKLED_INDEX}


@contextmanager
def open_source(
    name: str, out: Path, config: QuantizeConfig, *, progress: Progress, note: Callable[[str], None] = lambda _: None
) -> Iterator[Checkpoint]:
    """Open the checkpoint that the store `out` is made from, for as long as the block lasts.

    Pickles are read only if the config allows it, through a scratch folder beside `out`, and not at all where all that
    is asked for is there and only has to be compared. Raises the errors of `Checkpoint.open` and of `unpickled`.
    """
    found = resolve(name, allow_pickle=config.allow_pickle)
    if not config.allow_pickle or not has_pickles_alone(found.path):
        if found.repo is not None and not any(found.path.glob("*.safetensors")):
            raise MissingInputError(
                f"the Hub repository {found.repo!r} holds no safetensors; if its weights are pickles, loading them can"
                " run code: add --allow-pickle, which reads them in a confined process."
            )
        note_network(found.path, config.load, note)
        source = Checkpoint.at(found, load=config.load)
        source.require_plain()
        yield source
        return
    pickles = Pickles.at(found, progress=progress)
    pickles.unread.require_plain()
    scratch = out.with_name(f".{out.name}.unpickled")
    wanted = [out] if config.adapter_init is None else [out, adapter_folder(out)]
    if all(os.path.lexists(folder) for folder in wanted):
        yield pickles.unread
        _clear(pickles, scratch)
        return
    with _unpickled(pickles, scratch=scratch, progress=progress) as source:
        yield source


@contextmanager
def unpickled(
    name: str, *, scratch: Path, progress: Progress = lambda _what, _done, _total: None
) -> Iterator[Checkpoint]:
    """Open the pickled checkpoint in a folder or Hub repository, converted into the folder `scratch`.

    The checkpoint's identity names the pickles' sha256. `scratch` is deleted when the block is left without an error,
    and kept otherwise; interrupted and called again, the shards that are finished are not read again. Raises
    ConfinedError where a pickle is not what it should be, FormatError where its tensors are not, CommitError where
    `scratch` can't be written or holds something else, ConfigError where torch is too old.
    """
    pickles = Pickles.at(resolve(name, allow_pickle=True), progress=progress)
    with _unpickled(pickles, scratch=scratch, progress=progress) as checkpoint:
        yield checkpoint


@contextmanager
def _unpickled(pickles: Pickles, *, scratch: Path, progress: Progress) -> Iterator[Checkpoint]:
    _require_torch()
    if finished(scratch, kind="checkpoint", inputs=_inputs(pickles)) is None:
        _convert(pickles, scratch, progress=progress)
    opened = CheckpointFolder.open(scratch)
    yield replace(pickles.unread, path=scratch, weights=opened)
    _clear(pickles, scratch)


def _inputs(pickles: Pickles) -> dict[str, Mapping[str, Mapping[str, str]]]:
    return {"source": {"sha256": {**pickles.sha256, **pickles.others}}}


def _clear(pickles: Pickles, scratch: Path) -> None:
    if finished(scratch, kind="checkpoint", inputs=_inputs(pickles)) is not None:
        remove_folder(scratch)
    finish_removal(scratch)


def _convert(pickles: Pickles, scratch: Path, *, progress: Progress) -> None:
    """Write the scratch folder: each pickle as a shard of safetensors, and all that lies beside them as it is."""
    source = pickles.found.path
    shards = dict(zip(pickles.names, shard_names(len(pickles.names)), strict=True))
    with commit_folder(scratch, kind="checkpoint", inputs=_inputs(pickles)) as work:
        wanted = sum(pickles.stamps[name].n_bytes for name, shard in shards.items() if shard not in work.done)
        require_space(scratch, needed=wanted)
        for name, shard in shards.items():
            if shard not in work.done:
                _convert_one(source / name, pickles.stamps[name], work, shard, progress=progress)
            tensors = TensorFile.open(work.path / shard).infos
            if pickles.weight_map is not None:
                check_shard(source / PICKLED_INDEX, pickles.weight_map, name, tensors=tensors)
        if pickles.weight_map is not None and len(shards) > 1:
            placed = {tensor: shards[name] for tensor, name in pickles.weight_map.items()}
            work.write(INDEX, pretty({"metadata": {}, "weight_map": placed}))
        for file in [source / CONFIG, *_beside(source).carried_files()]:
            work.copy(file, file.name)
        work.finish()


def _convert_one(path: Path, hashed: _Stamp, work: PartialFolder, shard: str, *, progress: Progress) -> None:
    """Read one pickle, unchanged since it was hashed, in a confined process, and write what that answers."""
    try:
        file = path.open("rb")
    except OSError as fault:
        raise MissingInputError(f"cannot read {path}: {fault.strerror}.") from fault
    with file, work.create(shard) as writer:
        n_bytes = hashed.n_bytes
        slow = n_bytes // _SLOWEST_BYTES_PER_SECOND
        limits = Limits(
            memory_bytes=ALLOWANCE_BYTES,
            cpu_seconds=_PATIENCE_SECONDS + slow,
            wait_seconds=2 * (_PATIENCE_SECONDS + slow),
            output_bytes=MAX_GROWTH * n_bytes + MAX_HEADER_BYTES,
        )
        written = 0

        def write(piece: bytes) -> None:
            nonlocal written
            writer.write(piece)
            written += len(piece)
            progress(f"read {path.name}", min(written, n_bytes), n_bytes)

        run_confined(_TASK, {}, what=f"cannot read {path}", limits=limits, write=write, file=file)
        if _Stamp.of(path) != hashed:
            raise DataError(f"{path} was changed while it was read: is another program writing it?")


def _beside(folder: Path) -> CheckpointFolder:
    """What lies beside the weights, as a folder without any."""
    return CheckpointFolder(folder, config=read_object(folder / CONFIG), generation_config={}, files={}, manifest=None)


def _require_torch() -> None:
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        raise ConfigError(
            f"torch {torch.__version__} is installed, and pickles are read with torch"
            f" {'.'.join(map(str, OLDEST_TORCH))} or newer, since older ones need the data too or can be made to run"
            " code: update torch, or convert the weights to safetensors."
        )
