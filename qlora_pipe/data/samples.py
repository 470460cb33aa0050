"""Load a dataset named on the command line as samples, and keep a share of them for evaluation."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pluggy

from qlora_pipe.data.encode import ENCODING_VERSION, Sample, encode
from qlora_pipe.data.order import held_out_order
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.dataset import Dataset
from qlora_pipe.errors import DataError, MissingInputError, UsageProblem
from qlora_pipe.plugins import datasets, find_dataset

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """What `NAME:PATH` stands for."""

    dataset: Dataset
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleStats:
    """Counts of what was loaded."""

    rows: int
    chats: int
    """Rows that are conversations, whose turns were given markers."""
    samples: int
    cut: int
    """Samples that were longer than allowed."""
    tokens: int
    trained: int
    """Tokens that are targets."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleSet:
    """A dataset's samples, in the order of its rows."""

    samples: list[Sample]
    stats: SampleStats


def find_source(spec: str, *, manager: pluggy.PluginManager) -> DataSource:
    """Read `NAME:PATH`; UsageProblem for another form or an unknown name, MissingInputError for a path that is not."""
    name, _, place = spec.partition(":")
    if not name or not place:
        installed = ", ".join(datasets(manager)) or "none"
        raise UsageProblem(
            f"{spec!r} does not name data: write NAME:PATH, such as alpaca:train.json (installed: {installed})"
        )
    dataset = find_dataset(manager, name)
    path = Path(place).expanduser()
    if not (path.is_file() or path.is_dir()):
        raise MissingInputError(f"no file or folder at {path} (asked for by {spec})")
    return DataSource(dataset=dataset, path=path)


def fingerprint_source(source: DataSource, *, tokenizer: Tokenizer, max_tokens: int) -> str:
    """Hash all that the samples depend on, without making them: names and bytes of files, tokenizer and settings.

    Hexadecimal; changes whenever the same command might load other samples.
    """
    digest = hashlib.sha256()
    settings = (
        ENCODING_VERSION, source.dataset.name, tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id, max_tokens
    )  # fmt: skip
    digest.update(repr(settings).encode())
    is_folder = source.path.is_dir()
    files = sorted(file for file in source.path.rglob("*") if file.is_file()) if is_folder else [source.path]
    for file in files:
        # A lone file's name is no part of it: renamed, it holds the same samples.
        name = str(file.relative_to(source.path)) if is_folder else ""
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as fault:
            raise MissingInputError(f"{file} cannot be read: {fault.strerror}") from fault
        digest.update(repr((name, content)).encode())
    return digest.hexdigest()


def load_samples(
    spec: str,
    *,
    tokenizer: Tokenizer,
    max_tokens: int,
    manager: pluggy.PluginManager,
    progress: Progress | None = None,
    check: Callable[[], None] | None = None,
) -> SampleSet:
    """Read, tokenise and mask the rows that `spec`, NAME:PATH, names.

    `check` is called before each row and may raise, so that a signal stops a long load; `progress` after each, with
    the number of rows done and None for the unknown total. DataError names file and line of a row that can't be used.
    """
    source = find_source(spec, manager=manager)
    samples: list[Sample] = []
    rows = chats = 0
    for example in source.dataset.read(source.path):
        if check is not None:
            check()
        samples.extend(encode(example, tokenizer, max_tokens=max_tokens))
        rows += 1
        chats += example.form is None
        if progress is not None:
            progress(rows, None)
    if not samples:
        raise DataError(f"{source.path} holds no rows")
    stats = SampleStats(
        rows=rows,
        chats=chats,
        samples=len(samples),
        cut=sum(sample.cut for sample in samples),
        tokens=sum(len(sample.ids) for sample in samples),
        trained=sum(int(sample.trained.sum()) for sample in samples),
    )
    return SampleSet(samples=samples, stats=stats)


def split_held_out(samples: Sequence[Sample], *, share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split into (to train on, held out): round(share * n) drawn by `seed`, but never all; both keep their order."""
    count = min(round(share * len(samples)), len(samples) - 1)
    held_out = set(held_out_order(len(samples), seed=seed)[:count].tolist())
    train = [sample for index, sample in enumerate(samples) if index not in held_out]
    return train, [samples[index] for index in sorted(held_out)]
