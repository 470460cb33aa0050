"""How much memory is left for a step."""

import ctypes
import platform
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)

# Of malloc.h; what is larger than this many bytes comes from the system each time, the most that the library allows.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_HEAPED = 32 << 20


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; 0 where the system does not say.

    On a GPU: what the driver has left, and what torch holds without using it. On a CPU: what the system, or the
    container's limit, leaves.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_available(), *_container_limits()])


def _available() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _container_limits() -> list[int]:
    found = []
    for limit, usage in _CGROUPS:
        if limit.exists() and usage.exists():
            most = limit.read_text().strip()
            if most.isdigit():
                found.append(max(0, int(most) - int(usage.read_text())))
    return found


def keep_freed_memory() -> None:
    """Let this process use the memory of freed tensors again instead of giving it back to the system, where it can.

    A step allocates and frees the same tensors every time, and each page that the system gives anew is a fault and
    zeros to write: a tenth of a step on a CPU. It is a setting of the GNU C library; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (_M_MMAP_THRESHOLD, _LARGEST_HEAPED),
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_TOP_PAD, 64 << 20),
        ):
            mallopt(parameter, value)
