"""How much memory is left for a step."""

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


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
