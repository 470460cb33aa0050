"""What long work says on stderr: a bar on a terminal, plain lines elsewhere. A plugin like any other."""

import sys
import time
from types import TracebackType
from typing import Any, Self

import click
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_pipe.hookspecs import hookimpl

_SECONDS_BETWEEN_LINES = 2.0


class Console:
    """Shows the progress of one command; used as a context manager around its work."""

    def __init__(self, *, steps: int = 0) -> None:
        # Steps that a fine-tune will take.
        self._steps = steps
        self._terminal = Terminal(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._terminal.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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
        if self._bar is None:
            now = time.monotonic()
            if done == total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._last_line = now
                click.echo(f"{what} {done}" + ("" if total is None else f"/{total}"), err=True)
            return
        if self._task is None:
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, completed=done, total=total, description=what)

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

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr)  # noqa: T201
