"""The two errors of this package; each carries one clear sentence for the user."""

from typing import Literal

Reason = Literal["conflict", "locked", "disk"]


class FormatError(Exception):
    """A file or folder is not what it should be: what was asked, what there is, what to do."""


class CommitError(FormatError):
    """A file or folder could not be written.

    `reason` is "conflict" (something else lies there), "locked" (another process is writing it)
    or "disk" (the system refused: full, read-only, broken, not permitted).
    """

    def __init__(self, message: str, *, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason
