"""How a process shuts itself in: resource limits everywhere, and on Linux no privileges and no file system.

All of it is taken by the process itself, after it has loaded its libraries and before it sees a stranger's byte, so
the caller needs no code between fork and exec, and the limits count from what the libraries take.
"""

import ctypes
import os
import resource
import signal
import struct
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

# Landlock (landlock(7)); these numbers are the same on every architecture.
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_VERSION = 1
# How many rights on files each version of the interface knows, from the first on; the last holds for all later ones.
_FILE_RIGHTS = (13, 14, 15, 15, 16)
_ALL_TCP = 0b11
_ALL_SCOPES = 0b11


def die_with_parent(parent: int) -> None:
    """Be killed when the process `parent` goes, however it goes; where the system has no such thing, do nothing."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def shut_in(*, memory_bytes: int, cpu_seconds: int) -> None:
    """Give up, for good, whatever mere computing does not need.

    From here on this process can open nothing, no file and no socket, and start nothing (root can fork, and nothing
    else): open files and pipes keep working. It has `memory_bytes` more than it has now, and `cpu_seconds` more.
    """
    if sys.platform == "linux":
        _limit(resource.RLIMIT_AS, _address_space() + memory_bytes)
        forbid_files_and_tcp()
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
    # The first limit is a signal that says which limit it was, the second one kills.
    _limit(resource.RLIMIT_CPU, seconds, at_last=seconds + 1)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    # No new descriptor at all, of a file, a pipe or a socket.
    _limit(resource.RLIMIT_NOFILE, 0)


def forbid_files_and_tcp() -> bool:
    """Use Landlock to give up every right on files, and TCP; False where the kernel does not offer it.

    On kernels that know them, signals to other processes and abstract sockets go too.
    """
    # Landlock is open to those alone who can gain nothing by running another program.
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    version = _syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    if version < 1:
        return False
    files = (1 << _FILE_RIGHTS[min(version, len(_FILE_RIGHTS)) - 1]) - 1
    handled = struct.pack("=QQQ", files, _ALL_TCP, _ALL_SCOPES)[: 8 if version < 4 else 16 if version < 6 else 24]
    # A ruleset without rules allows nothing of what it handles.
    rules = _syscall(_LANDLOCK_CREATE_RULESET, handled, len(handled), 0)
    if rules < 0:
        return False
    shut = _syscall(_LANDLOCK_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return shut


def _limit(kind: int, most: int, *, at_last: int | None = None) -> None:
    # A limit that is lower already stays, since only root may raise it.
    _, hard = resource.getrlimit(kind)
    known = [] if hard == resource.RLIM_INFINITY else [hard]
    resource.setrlimit(kind, (min([most, *known]), min([most if at_last is None else at_last, *known])))


def _address_space() -> int:
    """Bytes of addresses that this process has mapped."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[0]) * resource.getpagesize()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), *(ctypes.c_ulong(0),) * 3)


def _syscall(number: int, *arguments: bytes | int | None) -> int:
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result: int = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *words)
    return result
