"""Turn the rows of a source into samples, batch by batch, and keep the rows that can't be used, with the reason."""

import base64
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from qlora_pipe.data.encode import Sample
from qlora_pipe.data.sample_file import SampleWriter, Sink, largest_id
from qlora_pipe.data.source import DataSource
from qlora_pipe.dataset import Example
from qlora_pipe.errors import DataError
from qlora_pipe.rows import BadRow, Row

OnBadRow = Literal["fail", "skip"]
Progress = Callable[[int, int | None], None]

# Rows that are encoded together: enough that the tokenizer's threads have work, and no more text than this.
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 1 << 21


class SampleEncoder(Protocol):
    """What makes samples of examples."""

    @property
    def fingerprint(self) -> str:
        """All that samples follow from besides the rows, in hexadecimal."""

    def encode(self, examples: Sequence[Example]) -> Iterator[list[Sample] | DataError]:
        """Give for each example, in order, its samples or what is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleStats:
    """Counts of what was loaded."""

    rows: int = 0
    """Rows that gave samples, or none and no fault either."""
    bad: int = 0
    """Rows that can't be used."""
    samples: int = 0
    cut: int = 0
    """Samples that were longer than allowed."""
    tokens: int = 0
    trained: int = 0
    """Tokens that are targets."""
    largest_id: int = -1


@dataclass(frozen=True, kw_only=True)
class Build:
    """The work of making a source's samples; `check` may raise to end it."""

    source: DataSource
    encoder: SampleEncoder
    on_bad_row: OnBadRow
    progress: Progress | None = None
    check: Callable[[], None] | None = None

    def run(self, records: Sink, index: Sink, quarantine: Sink) -> SampleStats:
        """Write samples and bad rows; DataError for the first of these unless they are to be skipped."""
        writer, stats = SampleWriter(records, index), SampleStats()
        for batch in self._batches():
            samples, bad, rows = self._encoded(batch)
            if bad and self.on_bad_row == "fail":
                raise DataError(bad[0].reason)
            writer.write(samples)
            quarantine.write(b"".join(map(quarantine_line, bad)))
            stats = dataclasses.replace(
                stats,
                rows=stats.rows + rows,
                bad=stats.bad + len(bad),
                samples=stats.samples + len(samples),
                cut=stats.cut + sum(sample.cut for sample in samples),
                tokens=stats.tokens + sum(len(sample.ids) for sample in samples),
                trained=stats.trained + sum(int(sample.trained.sum()) for sample in samples),
                largest_id=max(stats.largest_id, largest_id(samples)),
            )
            if self.progress is not None:
                self.progress(stats.rows + stats.bad, None)
        return stats

    def _batches(self) -> Iterator[list[tuple[Row, list[Example]] | BadRow]]:
        batch: list[tuple[Row, list[Example]] | BadRow] = []
        characters = 0
        for item in self.source.read():
            if self.check is not None:
                self.check()
            batch.append(item)
            if isinstance(item, BadRow):
                characters += len(item.raw)
            else:
                characters += sum(len(message.content) for example in item[1] for message in example.messages)
            if len(batch) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _encoded(self, batch: Sequence[tuple[Row, list[Example]] | BadRow]) -> tuple[list[Sample], list[BadRow], int]:
        """The samples of a batch, its bad rows, and how many rows the others are.

        A row of several examples is bad if one of them is.
        """
        examples = [example for item in batch if not isinstance(item, BadRow) for example in item[1]]
        encoded = iter(self.encoder.encode(examples))
        samples: list[Sample] = []
        bad: list[BadRow] = []
        rows = 0
        for item in batch:
            if isinstance(item, BadRow):
                bad.append(item)
                continue
            row, its_examples = item
            found = [next(encoded) for _ in its_examples]
            fault = next((each for each in found if isinstance(each, DataError)), None)
            if fault is not None:
                bad.append(BadRow(reason=str(fault), raw=row.raw))
                continue
            samples += [sample for each in found if not isinstance(each, DataError) for sample in each]
            rows += 1
        return samples, bad, rows


def quarantine_line(bad: BadRow) -> bytes:
    """One line of JSON: why a row can't be used, and the row, as text or else in base64."""
    try:
        kept = {"row": bad.raw.decode()}
    except UnicodeDecodeError:
        kept = {"row_base64": base64.b64encode(bad.raw).decode()}
    # A name in a reason may hold half a surrogate pair, which is no UTF-8.
    return json.dumps({"reason": bad.reason, **kept}).encode() + b"\n"
