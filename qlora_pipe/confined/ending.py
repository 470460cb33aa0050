"""How confined work ends, as the process tells it to its caller. Imports nothing."""

from enum import IntEnum


class Refused(Exception):
    """The stranger's bytes are not what they should be; the message completes a sentence."""


class Ending(IntEnum):
    """Exit codes of the confined process. The last line on stderr gives the reason of REFUSED and FAILED."""

    DONE = 0
    REFUSED = 65
    FAILED = 70
    NO_MEMORY = 71
