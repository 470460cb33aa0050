"""Samples that were made once, kept on disk under a hash of all that they follow from."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_formats.commit import commit_folder
from qlora_formats.errors import CommitError, FormatError
from qlora_formats.header import Stamp
from qlora_formats.held_file import HeldFile
from qlora_formats.removal import set_aside
from qlora_formats.target import finished
from qlora_pipe.data.build import Build, SampleStats
from qlora_pipe.data.sample_file import INDEX, INDEX_TYPE, RECORDS, InMemory, StoredSamples

QUARANTINE = "quarantine.jsonl"
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A source's samples, and what was counted when they were made."""

    samples: StoredSamples
    stats: SampleStats
    quarantine: Callable[[], Iterator[bytes]]
    """Gives the lines of the rows that can't be used."""
    new: bool
    """Whether they were made by this call."""


def in_memory(build: Build) -> Kept:
    """Make the samples and keep them in memory."""
    records, index, quarantine = InMemory(), InMemory(), InMemory()
    stats = build.run(records, index, quarantine)
    samples = StoredSamples(records, np.frombuffer(bytes(index), INDEX_TYPE))
    lines = bytes(quarantine).splitlines(keepends=True)
    return Kept(samples=samples, stats=stats, quarantine=lambda: iter(lines), new=True)


def on_disk(build: Build, folder: Path, *, note: Callable[[str], None]) -> Kept:
    """Open the samples kept in `folder`, or make them there; whole, or not at all.

    Every byte is checked first: what is damaged, or none of ours, is set aside and made anew. While another process
    makes the same, this one waits, and asks the build's `check` whether to go on.
    """
    inputs = {"samples": folder.name}
    waiting = False
    while True:
        if (kept := _opened(folder, inputs, note=note)) is not None:
            return kept
        try:
            _make(build, folder, inputs)
        except CommitError as fault:
            if fault.reason == "disk":
                raise CommitError(f"{fault}. QLORA_PIPE_CACHE can name another folder", reason="disk") from fault
            # Another process is at it, or has just finished.
            if fault.reason != "locked" and not os.path.lexists(folder):
                raise
            if not waiting:
                note("another process is tokenising the same rows; waiting for it.")
                waiting = True
            if build.check is not None:
                build.check()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        else:
            made = _opened(folder, inputs, note=note)
            assert made is not None, "it has just been committed"
            return dataclasses.replace(made, new=True)


def _make(build: Build, folder: Path, inputs: dict[str, Any]) -> None:
    with commit_folder(folder, kind="samples", inputs=inputs, restart=True) as partial:
        try:
            with (
                partial.create(RECORDS) as records,
                partial.create(INDEX) as index,
                partial.create(QUARANTINE) as quarantine,
            ):
                stats = build.run(records, index, quarantine)
            partial.finish({"stats": dataclasses.asdict(stats)})
        except BaseException:
            # Half of the samples help nobody: the next try begins anew.
            partial.abandon()
            raise


def _opened(folder: Path, inputs: dict[str, Any], *, note: Callable[[str], None]) -> Kept | None:
    """What is kept in a folder; None where nothing is, or nothing that can be used."""
    try:
        manifest = finished(folder, kind="samples", inputs=inputs)
        if manifest is None:
            return None
        manifest.verify(folder)
        stats = SampleStats(**manifest.fields["stats"])
        state = (folder / RECORDS).stat()
        records = HeldFile(folder / RECORDS, Stamp(state.st_size, state.st_mtime_ns))
        index = np.frombuffer((folder / INDEX).read_bytes(), INDEX_TYPE)
    except (CommitError, FormatError, OSError) as fault:
        if not os.path.lexists(folder):
            return None
        note(f"kept samples are made anew, since {fault}; {set_aside(folder)} holds what there was.")
        return None
    return Kept(
        samples=StoredSamples(records, index), stats=stats, quarantine=lambda: _lines(folder / QUARANTINE), new=False
    )


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file
