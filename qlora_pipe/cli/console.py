"""What long work says on stderr: a bar on a terminal, plain lines elsewhere. A plugin like any other."""

import sys
import time
from types import TracebackType
from typing import Any, NamedTuple, Self

import click
from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_pipe.hookspecs import hookimpl

_SECONDS_BETWEEN_LINES = 2.0
_SECONDS_TO_A_RATE = 0.1


class _Rate(NamedTuple):
    """When the bytes of one task began to flow, and how many there were before."""

    what: str
    before: int
    since: float

    def of(self, done: int, now: float) -> float:
        """Bytes per second; 0 where too little has gone by to tell."""
        seconds = now - self.since
        return (done - self.before) / seconds if seconds > _SECONDS_TO_A_RATE else 0.0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Console:
    """Shows the progress of one command; used as a context manager around its work."""

    def __init__(self, *, steps: int = 0) -> None:
        # Steps that a fine-tune will take.
        self._steps = steps
        self._terminal = Terminal(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._rate: _Rate | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._terminal.is_terminal:
            amount = TextColumn("{task.fields[amount]}")
            columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._terminal, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, sentence: str) -> None:
        """Say one sentence."""
        if self._bar is not None:
            self._bar.print(f"note: {sentence}", markup=False, highlight=False)
        else:
            click.echo(f"note: {sentence}", err=True)

    def count(self, what: str, done: int, total: int | None) -> None:
        """Show that `done` of `total` units are through; None where nobody knows how many there are."""
        amount = f"{done}" if total is None else f"{done}/{total}"
        if self._bar is not None:
            self._show(what, done, total, amount)
        elif done == total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._line(f"{what} {amount}")

    def transfer(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are through, how fast they go, and how long the rest will take.

        The rate is that of what came after the first call: what an earlier process did does not flatter it.
        """
        now = time.monotonic()
        if self._rate is None or self._rate.what != what:
            self._rate = _Rate(what, done, now)
        amount = (
            f"{done / 1e9:,.2f}/{total / 1e9:,.2f} GB" if total >= 1e9 else f"{done / 1e6:,.1f}/{total / 1e6:,.1f} MB"
        )
        bytes_per_second = self._rate.of(done, now)
        if bytes_per_second:
            amount += f"  {bytes_per_second / 1e6:,.0f} MB/s"
        if self._bar is not None:
            self._show(what, done, total, amount)
        elif done == total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            left = f"  ETA {_clock((total - done) / bytes_per_second)}" if bytes_per_second and done < total else ""
            self._line(f"{what} {amount}{left}")

    @hookimpl
    def step_finished(self, report: dict[str, Any]) -> None:
        """Show a training step: at most a line every two seconds where there is no terminal."""
        loss = "skipped" if report["loss"] is None else f"{report['loss']:.3f}"
        norm = "-" if report["grad_norm"] is None else f"{report['grad_norm']:.2f}"
        rate = report["tokens"] / max(report["seconds"], 1e-9)
        text = f"loss {loss}  |g| {norm}  {rate:,.0f} tok/s"
        if "eval_loss_start" in report:
            self._line(f"before    eval {report['eval_loss_start']:.3f}")
        if "eval_loss" in report:
            self._line(f"step {report['step']}/{self._steps}  {text}  eval {report['eval_loss']:.3f}")
        elif self._bar is None and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._line(f"step {report['step']}/{self._steps}  {text}")
        if self._bar is not None:
            self.count(text, report["step"], self._steps)

    def _show(self, what: str, done: int, total: int | None, amount: str) -> None:
        assert self._bar is not None
        if self._task is None:
            self._task = self._bar.add_task(what, total=total, amount=amount)
        self._bar.update(self._task, completed=done, total=total, description=what, amount=amount)

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr)  # noqa: T201
