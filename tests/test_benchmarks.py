"""What of the GPU's benchmarks can be tested without one."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("gpu_*.py"))


@pytest.mark.parametrize("benchmark_", BENCHMARKS, ids=lambda path: path.stem)
def test_without_a_gpu_it_says_so_in_one_sentence(benchmark_: Path) -> None:
    path = os.pathsep.join(str(ROOT / floor) for floor in (".", "formats", "kernels", "plugins"))
    done = subprocess.run(
        [sys.executable, str(benchmark_), "--quick"],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "this benchmark needs a CUDA GPU, and torch finds none here: run it on a machine that has one\n"
    )


@pytest.fixture
def gpu_nf4(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_nf4")


@pytest.mark.parametrize(
    ("n", "how", "goal", "met"),
    [
        (1 << 26, "GPU alone", ">= 0.92 of copy", "yes"),
        (1 << 26, "called", ">= 1.3 x peer", "no"),
        (1 << 24, "called", ">= 2.0 x peer", "no"),
        (1 << 24, "GPU alone", "-", "-"),
        (1 << 25, "called", "-", "-"),
    ],
)
def test_a_row_names_the_goals_of_its_size(gpu_nf4: ModuleType, n: int, how: str, goal: str, met: str) -> None:
    seconds = {"ours": 1e-4, "peer": 1.2e-4, "copy": 0.93e-4}
    timings = {name: gpu_nf4.gpu.Timing(each, each / 2, each * 2) for name, each in seconds.items()}
    task = gpu_nf4.Task("dequantize", 2.5, {}, 0.92, (2.0, 1.3))
    row = gpu_nf4.row(task, n, timings, how=how)
    assert (row["goal"], row["met"]) == (goal, met)
    assert row["of copy"] == 0.93
    assert row["x peer"] == 1.2
    assert row["GB/s"] == round(2.5 * n / 1e-4 / 1e9)
    assert row["spread"] == "0.50-2.00 / 0.50-2.00 / 0.50-2.00"
