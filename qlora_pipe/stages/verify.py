"""Verify: read everything a folder holds and compare it with what its writer recorded."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_formats.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder
from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.errors import FormatError
from qlora_formats.manifest import MANIFEST
from qlora_formats.store import Store, StoredWeight, is_store
from qlora_formats.verification import Verified, verify_folders
from qlora_pipe.artifacts import Run
from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.hub import resolve
from qlora_pipe.nn.linear import quantized_tensor
from qlora_pipe.settings import read_yaml
from qlora_pipe.train.checkpoint import checkpoints

# More damage than anyone reads.
_MOST_SENTENCES = 100


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What verifying found: a sentence per damaged thing, and what else is to be known."""

    kind: str
    checksums: bool
    """Whether there were any to compare with; a folder of another program has none."""
    files: int
    bytes: int
    seconds: float
    damage: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damage

    @property
    def summary(self) -> str:
        """One line for the user."""
        size = f"{self.files} file{'' if self.files == 1 else 's'}, {self.bytes / 1e6:,.1f} MB"
        if not self.checksums:
            return f"{self.kind}, {size}: nothing wrong was found, but it carries no checksums"
        rate = self.bytes / max(self.seconds, 1e-9) / 1e6
        return f"{self.kind}, {size}: every byte is as it was written ({rate:,.0f} MB/s)"

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    name: str,
    *,
    threads: int = 0,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> Verification:
    """Verify a store, checkpoint, adapter, training checkpoint or run, by folder or Hub id.

    Every checksum is computed, `threads` at a time (0: one per core), and all that is damaged is reported. A folder
    without checksums is checked as far as it can be: headers, index, config and, of 4-bit weights, that the scales are
    finite and the levels known. `progress` counts bytes. Raises MissingInputError where there is no such folder.
    """
    found = resolve(name).path
    start = time.perf_counter()
    notes: list[str] = []
    if Run.is_run(found):
        kind, folders, damage = "run", *_of_run(Run(found), notes)
    elif (found / MANIFEST).is_file():
        kind, folders, damage = "", [found], []
    else:
        return _foreign(found)
    verified = verify_folders(folders, threads=threads, progress=lambda done, total: progress("verify", done, total))
    # A run that is going on removes its old checkpoints.
    verified = [one for one in verified if one.folder.is_dir()]
    for one in verified:
        damage += one.damage
        notes += _unlisted(one)
    return Verification(
        kind=kind or next((one.kind for one in verified if one.kind), "folder"),
        checksums=True,
        files=sum(one.files for one in verified),
        bytes=sum(one.bytes for one in verified),
        seconds=time.perf_counter() - start,
        damage=_bounded(damage),
        notes=notes,
    )


def _of_run(run: Run, notes: list[str]) -> tuple[list[Path], list[str]]:
    """The committed folders of a run, and what is wrong with its settings."""
    folders = [*checkpoints(run.checkpoints_path)]
    if run.final_path.is_dir():
        folders.insert(0, run.final_path)
    else:
        notes.append("the run has not ended, so there is no final/ yet.")
    notes.append(f"{run.config_path.name} and {run.metrics_path.name} carry no checksums.")
    try:
        read_yaml(run.config_path)
    except ConfigError as fault:
        return folders, [str(fault)]
    return folders, []


def _unlisted(one: Verified) -> Iterator[str]:
    if one.unlisted and not one.damage:
        names = ", ".join(one.unlisted[:5]) + (", ..." if len(one.unlisted) > 5 else "")
        yield f"{one.folder}: {MANIFEST} does not vouch for {names}."


def _bounded(damage: list[str]) -> list[str]:
    more = len(damage) - _MOST_SENTENCES
    return damage if more <= 0 else [*damage[:_MOST_SENTENCES], f"and {more} more"]


def _foreign(path: Path) -> Verification:
    """What can be told of a folder that another program wrote."""
    start = time.perf_counter()
    kind = "adapter" if (path / ADAPTER_CONFIG).is_file() else "checkpoint"
    shards: list[Path] = []
    notes: list[str] = []
    try:
        if kind == "adapter":
            damage, shards = list(_adapter_faults(AdapterFolder.open(path))), [path / ADAPTER_WEIGHTS]
            checked = "header, config, shapes and that its values are finite"
        elif is_store(path):
            kind, store = "store", Store.open(path)
            damage, shards = list(_store_faults(store)), store.shards
            checked = "headers, index, config, each weight's quant_state, its levels and that its scales are finite"
        else:
            damage, shards = [], CheckpointFolder.open(path).shards
            checked = "headers, index and config"
        notes.append(f"{path} has no {MANIFEST}, so there are no checksums to compare. What was checked: {checked}.")
    except FormatError as fault:
        damage = [str(fault)]
    return Verification(
        kind=kind,
        checksums=False,
        files=len(shards),
        bytes=sum(shard.stat().st_size for shard in shards),
        seconds=time.perf_counter() - start,
        damage=_bounded(damage),
        notes=notes,
    )


def _store_faults(store: Store) -> Iterator[str]:
    """A sentence for each 4-bit weight that would come out as nonsense."""
    for name in store.names:
        if not store.is_quantized(name):
            continue
        try:
            stored = store.weight(name)
            assert isinstance(stored, StoredWeight)
            quantized_tensor(stored, name=f"{store.path}: {name}")
        except (FormatError, DataError) as fault:
            yield str(fault)
            continue
        # One per block, so these are looked at only here and where they are used.
        if not bool(torch.isfinite(stored.absmax.float()).all()):
            yield f"{store.path}: {name}: its absmax holds values that are not finite; fetch or make it again."


def _adapter_faults(adapter: AdapterFolder) -> Iterator[str]:
    for module, pair in adapter.pairs.items():
        if not all(bool(torch.isfinite(part).all()) for part in pair):
            yield f"{adapter.path}: the adapter of {module} holds values that are not finite; fetch or make it again."
