"""Load a dataset named on the command line as samples, and keep a share of them for evaluation."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pluggy

from qlora_pipe.data.build import Build, OnBadRow, Progress, SampleEncoder, SampleStats
from qlora_pipe.data.encode import Sample
from qlora_pipe.data.order import held_out_order
from qlora_pipe.data.sample_file import ChosenSamples, SampleSequence
from qlora_pipe.data.source import DataSource, find_source
from qlora_pipe.data.token_cache import in_memory, on_disk
from qlora_pipe.errors import DataError

__all__ = ["SampleSet", "SampleStats", "load_samples", "split_held_out"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleSet:
    """A dataset's samples, in the order of its rows."""

    samples: SampleSequence
    """Read from the disk where they are kept there: a few bytes of memory each."""
    stats: SampleStats
    source: DataSource
    quarantine: Callable[[], Iterator[bytes]]
    """Gives a line of JSON for each row that can't be used: its `reason`, and `row` or `row_base64`."""
    tokenised: int
    """Rows that this call had to read and tokenise; 0 where the samples were kept from an earlier one."""


def load_samples(
    spec: str | DataSource,
    *,
    encoder: SampleEncoder,
    manager: pluggy.PluginManager,
    split: str | None = None,
    fields: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "fail",
    cache: Path | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> SampleSet:
    """Read, tokenise and mask the rows that `spec`, such as NAME:PATH, names, or find them made in the folder `cache`.

    `check` is called before each row and may raise, so that a signal stops a long load; `progress` after each batch of
    rows, with the number of rows done and None for the unknown total. With `on_bad_row` "fail" DataError names file and
    line of the first row that can't be used; with "skip" those are counted and kept apart, and DataError says so where
    no other is left.
    """
    source = spec if isinstance(spec, DataSource) else find_source(spec, manager=manager, split=split, fields=fields)
    build = Build(source=source, encoder=encoder, on_bad_row=on_bad_row, progress=progress, check=check)
    if cache is None:
        kept = in_memory(build)
    else:
        key = hashlib.sha256(f"{source.fingerprint(encoder.fingerprint)} {source.code}".encode()).hexdigest()
        kept = on_disk(build, cache / "samples" / key, note=note)
    stats = kept.stats
    if stats.bad and (on_bad_row == "fail" or not stats.samples):
        reason = json.loads(next(kept.quarantine()))["reason"]
        raise DataError(reason if on_bad_row == "fail" else f"all {stats.bad} rows are bad; the first: {reason}")
    if not stats.samples:
        raise DataError(f"{source.path} holds no rows")
    return SampleSet(
        samples=kept.samples,
        stats=stats,
        source=source,
        quarantine=kept.quarantine,
        tokenised=stats.rows + stats.bad if kept.new else 0,
    )


def split_held_out(samples: Sequence[Sample], *, share: float, seed: int) -> tuple[SampleSequence, SampleSequence]:
    """Split into (to train on, held out): round(share * n) drawn by `seed`, but never all; both keep their order."""
    count = min(round(share * len(samples)), len(samples) - 1)
    is_held_out = np.zeros(len(samples), np.bool_)
    is_held_out[held_out_order(len(samples), seed=seed)[:count]] = True
    train, held_out = (np.flatnonzero(which) for which in (~is_held_out, is_held_out))
    return ChosenSamples(samples, train), ChosenSamples(samples, held_out)
