"""Signals set a flag; long loops look at it between two pieces of work, save and leave."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_pipe.errors import Interrupted

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """Raised by `StopFlag.check` where a loop can stop; the loop's owner saves and turns it into Interrupted."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopFlag:
    """Whether a signal has asked the work to stop."""

    def __init__(self) -> None:
        self.received: int | None = None

    def check(self) -> None:
        """Raise StopRequested if a signal has come; called where the state can be saved."""
        if self.received is not None:
            raise StopRequested(self.received)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            # A second Ctrl-C leaves at once; the last checkpoint is on disk.
            raise KeyboardInterrupt
        self.received = number


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch SIGINT, SIGTERM and SIGUSR1 for the length of a block, where Python allows it (the main thread)."""
    flag = StopFlag()
    try:
        previous = {number: signal.signal(number, flag._note) for number in CAUGHT}
    except ValueError:
        # Not the main thread: whoever runs us there keeps the signals.
        previous = {}
    try:
        yield flag
    except StopRequested as stop:
        raise Interrupted(
            f"stopped by {stop}; nothing that was done is lost. Run the same command again to go on.",
            signal_number=stop.signal_number,
        ) from stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
