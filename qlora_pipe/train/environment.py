"""What a run's last bits depend on besides its settings: noted in every checkpoint, compared on resume."""

import platform
from typing import Any

import torch


def fingerprint(device: torch.device) -> dict[str, Any]:
    """Describe the arithmetic of this process: versions, device and thread count."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found
