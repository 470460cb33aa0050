"""What can go wrong for a reason the user can mend: one sentence each, and the exit code that belongs to it.

A message says what was asked, what there is, and what to do. The command line turns these into `error: ...` in one
place (qlora_pipe/cli); everything else that is raised is our own bug. Exit codes are those of sysexits.h.
"""


class QlorapipeError(Exception):
    """Base of every error that the user can mend."""

    exit_code: int = 70


class UsageProblem(QlorapipeError):
    """The command's words contradict each other."""

    exit_code = 2


class DataError(QlorapipeError):
    """A file holds something that cannot be used: a malformed row, a truncated tensor, an adapter of another model."""

    exit_code = 65


class NonFiniteError(DataError):
    """Training met NaN or infinity too often to go on."""


class MissingInputError(QlorapipeError):
    """A file or folder that was named is not there, or only half there."""

    exit_code = 66


class NetworkError(QlorapipeError):
    """The Hub did not answer, or said no."""

    exit_code = 69


class ExistsError(QlorapipeError):
    """Something else is already where the output should go."""

    exit_code = 73


class DiskError(QlorapipeError):
    """The disk refused a write."""

    exit_code = 74


class TryAgainError(QlorapipeError):
    """Another process is busy with the same output."""

    exit_code = 75


class ConfigError(QlorapipeError):
    """A setting, a config file or a model's config is not usable."""

    exit_code = 78


class Interrupted(QlorapipeError):
    """A signal asked the command to stop, and what it had is saved: exit 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
