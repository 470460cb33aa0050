"""What is left of memory, and memory that a process keeps for itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_pipe.train.memory import free_bytes

_FAULTS = """
import resource, sys, torch
from qlora_pipe.train.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    held = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(16)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of the GNU C library")
def test_tensors_that_come_again_take_the_memory_they_had() -> None:
    def faults(way: str) -> int:
        done = subprocess.run([sys.executable, "-c", _FAULTS, way], capture_output=True, text=True, check=True)
        return int(done.stdout)

    # 640 MiB in all: the pages of one tensor would be 1,024 faults.
    assert faults("keep") < 1024


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say how much memory it has")
def test_free_memory_is_no_more_than_the_machine_has() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_bytes(torch.device("cpu")) <= total
