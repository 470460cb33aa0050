"""Preview: how rows become tokens, which of them are trained, and what would train wrongly, before any training."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pluggy
from numpy.typing import NDArray

from qlora_pipe.artifacts import open_model
from qlora_pipe.config import PreviewConfig
from qlora_pipe.data.encode import Encoder, Sample
from qlora_pipe.data.order import epoch_order
from qlora_pipe.data.pack import pack_epoch
from qlora_pipe.data.place import cache_folder
from qlora_pipe.data.sample_file import lengths_of, source_lengths_of
from qlora_pipe.data.samples import load_samples
from qlora_pipe.data.source import find_source, parse_fields
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.plugins import find_architecture
from qlora_pipe.stages.encoder import encoder_of

# Origins and reasons that are named; the others are counted.
_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One token of a sample."""

    id: int
    text: str
    """What it adds to a text; a control token as it is written."""
    trained: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One sample, token by token."""

    origin: str
    source: tuple[Token, ...]
    """What the encoder of a seq2seq model reads; () of a causal one."""
    tokens: tuple[Token, ...]
    cut: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One way in which samples would train wrongly, or rows not at all."""

    count: int
    of: str
    """What is counted: "row" or "sample"."""
    what: str
    """What is wrong with them, to stand after it."""
    named: tuple[str, ...]
    """The first of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What a dataset becomes."""

    shown: tuple[Shown, ...]
    rows: int
    samples: int
    tokens: int
    trained: int
    shortest: int
    median: int
    longest: int
    padding: float
    """Share of an epoch's positions that are padding, as the settings have it."""
    padding_packed: float | None
    """The same if samples were packed; None where they are, or can't be."""
    faults: tuple[Fault, ...]


def preview(
    base: str,
    data: str,
    config: PreviewConfig,
    *,
    manager: pluggy.PluginManager,
    note: Callable[[str], None] = lambda _: None,
    progress: Callable[[str, int, int | None], None] = lambda _what, _done, _total: None,
) -> Preview:
    """Encode all of a dataset as `finetune` would, and say what becomes of it; no weight of the base is read.

    The samples are kept where `finetune` finds them. Raises what finding and encoding the data raises, DataError where
    every row is bad.
    """
    model = open_model(base, note=note)
    architecture = find_architecture(manager, model.config.get("model_type"), config=model.config)
    encoder = encoder_of(model, architecture, config, manager=manager, note=note)
    source = find_source(data, manager=manager, split=config.split, fields=parse_fields(config.map))
    found = load_samples(
        source,
        encoder=encoder,
        manager=manager,
        on_bad_row="skip",
        cache=cache_folder(),
        progress=lambda done, total: progress("tokenise rows", done, total),
        note=note,
    )
    faults = [*_bad_rows(found.stats.bad, found.quarantine()), *_cut(found.stats.cut, found.samples, encoder)]
    lengths, sources = lengths_of(found.samples), source_lengths_of(found.samples)
    ordered = np.sort(lengths + sources)
    packs = architecture.packs and not config.pack
    return Preview(
        shown=tuple(_shown(sample, encoder.tokenizer) for sample in islice(found.samples, config.rows)),
        rows=found.stats.rows,
        samples=found.stats.samples,
        tokens=found.stats.tokens + int(sources.sum()),
        trained=found.stats.trained,
        shortest=int(ordered[0]),
        median=int(ordered[len(ordered) // 2]),
        longest=int(ordered[-1]),
        padding=padding_share([lengths - 1, sources], config, pack=config.pack),
        padding_packed=padding_share([lengths - 1], config, pack=True) if packs else None,
        faults=tuple(faults),
    )


def _shown(sample: Sample, tokenizer: Tokenizer) -> Shown:
    source = [] if sample.source is None else sample.source.tolist()
    return Shown(
        origin=sample.origin,
        source=tuple(Token(id=each, text=text_of(each, tokenizer), trained=False) for each in source),
        tokens=tuple(
            Token(id=each, text=text_of(each, tokenizer), trained=trained)
            for each, trained in zip(sample.ids.tolist(), sample.trained.tolist(), strict=True)
        ),
        cut=sample.cut,
    )


def text_of(token: int, tokenizer: Tokenizer) -> str:
    """Say what a token adds to a text that it stands in; one that is no whole character by its name."""
    once, twice = (tokenizer.inner.decode([token] * times, skip_special_tokens=False) for times in (1, 2))
    # A first space is dropped in decoding, the second token's is not.
    added: str = twice[len(once) :] if twice.startswith(once) else once
    if added and "\ufffd" not in added:
        return added
    name: str | None = tokenizer.inner.id_to_token(token)
    return f"<{token}>" if name is None else name


def _bad_rows(count: int, quarantine: Iterator[bytes]) -> Iterator[Fault]:
    if count:
        reasons = tuple(json.loads(line)["reason"] for line in islice(quarantine, _NAMED))
        yield Fault(count=count, of="row", what="that can't be used", named=reasons)


def _cut(count: int, samples: Sequence[Sample], encoder: Encoder) -> Iterator[Fault]:
    """Samples that lose their end. (That each answer has one, the encoder sees to: else the row is bad.)"""
    if count:
        named = tuple(islice((sample.origin for sample in samples if sample.cut), _NAMED))
        lost = "an answer's end" if encoder.kind == "causal" else "the end of a source or an answer"
        what = f"cut at {encoder.max_tokens} tokens, where {lost} is lost (raise --max-tokens)"
        yield Fault(count=count, of="sample", what=what, named=named)


def padding_share(sides: Sequence[NDArray[np.int64]], config: PreviewConfig, *, pack: bool) -> float:
    """Give the share of the first epoch's positions that are padding; `sides` are lengths [n]: of ids, of sources."""
    count = len(sides[0])
    used = positions = 0
    for lengths in sides:
        if pack:
            rows = pack_epoch(lengths, capacity=config.max_tokens, seed=config.seed, epoch=0)
            widths = np.fromiter((lengths[rows[number]].sum() for number in range(len(rows))), np.int64, len(rows))
        else:
            widths = lengths[epoch_order(count, seed=config.seed, epoch=0)]
        for start in range(0, len(widths), config.batch_size):
            batch = widths[start : start + config.batch_size]
            positions += int(batch.max()) * len(batch)
        used += int(lengths.sum())
    return 1 - used / max(1, positions)
