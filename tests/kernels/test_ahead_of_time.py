"""Kernels compile for real GPUs on a machine without one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# By name, since importing ahead_of_time.py imports Triton.
MODULES = sorted(path.stem for path in (KERNELS / "qlora_kernels").glob("*_triton.py"))
MEASURED = ("sm_80", "sm_90")
OTHERS = ("sm_75", "sm_86", "sm_89", "sm_100", "sm_120", "gfx942")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists on Linux only")


def _run(cache: Path, *arguments: str) -> str:
    """Run Python in a process of its own, since none with TRITON_INTERPRET=1 can compile, and with an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment | {"PYTHONPATH": str(KERNELS), "TRITON_CACHE_DIR": str(cache)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _compiled(cache: Path, *arguments: str) -> list[dict]:
    printed = _run(cache, "-m", "qlora_kernels.ahead_of_time", "--processes", "1", *arguments)
    return [json.loads(line) for line in printed.splitlines()]


@pytest.mark.parametrize("module", MODULES)
def test_every_variant_compiles_for_sm_80_and_sm_90_without_spills(module: str, tmp_path: Path) -> None:
    rows = _compiled(tmp_path, "--modules", module, "--targets", *MEASURED)
    variants = [{row["kernel"] for row in rows if row["target"] == target} for target in MEASURED]
    assert variants[0] == variants[1] != set()
    assert len(rows) == 2 * len(variants[0])
    for row in rows:
        assert row["binary_bytes"] > 0, row
        assert row["stack_bytes"] == 0, f"registers spill to memory: {row}"
        assert 0 < row["registers"] <= row["registers_allowed"], row


@pytest.mark.parametrize("module", MODULES)
def test_each_kernel_compiles_for_the_other_targets(module: str, tmp_path: Path) -> None:
    rows = _compiled(tmp_path, "--modules", module, "--one-per-kernel", "--targets", *OTHERS)
    assert {row["target"] for row in rows} == set(OTHERS)
    assert all(row["binary_bytes"] > 0 and row["registers"] > 0 for row in rows)


def test_codes_are_read_and_16_bit_weights_written_16_bytes_at_a_time(tmp_path: Path) -> None:
    print_ptx = (
        "from qlora_kernels.ahead_of_time import compile_variant, variants\n"
        "chosen = [v for v in variants('dequantize_triton') if v.name == 'dequantize_bf16_block64_nested256']\n"
        "for target in ('sm_80', 'sm_90'): print(compile_variant(*chosen, target).asm['ptx'])"
    )
    programs = _run(tmp_path, "-c", print_ptx).split(".version")[1:]
    assert len(programs) == 2
    for ptx in programs:
        assert set(re.findall(r"\bst\.global\S*", ptx)) == {"st.global.v4.b32"}
        assert len(re.findall(r"\bld\.global\.L1::evict_first\S*\.v4\.b32", ptx)) == 1
        assert "cvt.rn.bf16x2.f32" in ptx
