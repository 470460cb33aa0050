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


_PRINT_STAGES = """
import json
from qlora_kernels.ahead_of_time import compile_variant, variants

for module, name in (
    ("dequantize_triton", "dequantize_bf16_block64_nested256"),
    ("quantize_triton", "quantize_nf4_bf16_block64"),
):
    [variant] = [each for each in variants(module) if each.name == name]
    for target in ("sm_80", "sm_90"):
        stages = compile_variant(variant, target).asm
        print(json.dumps([stages["ttgir"], stages["ptx"]]))
"""


def _layout(ttgir: str, access: str) -> str:
    """How the threads share the 16-bit weights that `access` reads or writes."""
    [name] = re.findall(rf"{re.escape(access)} .*x!tt.ptr<bf16>, (#\w+)>", ttgir)
    return re.search(rf"^{name} = (.*)$", ttgir, re.MULTILINE)[1]


def test_a_warp_moves_codes_and_16_bit_weights_16_bytes_a_thread_side_by_side(tmp_path: Path) -> None:
    compiled = [json.loads(line) for line in _run(tmp_path, "-c", _PRINT_STAGES).splitlines()]
    side_by_side = "sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]"
    assert len(compiled) == 4
    for ttgir, ptx in compiled[:2]:
        assert side_by_side in _layout(ttgir, "tt.store")
        assert set(re.findall(r"\bst\.global\S*", ptx)) == {"st.global.v4.b32"}
        assert len(re.findall(r"\bld\.global\.L1::evict_first\S*\.v4\.b32", ptx)) == 1
        assert "cvt.rn.bf16x2.f32" in ptx
    for ttgir, ptx in compiled[2:]:
        assert side_by_side in _layout(ttgir, "tt.load")
        assert len(re.findall(r"\bld\.global\.L1::evict_first\S*\.v4\.b32", ptx)) == 4
        assert len(re.findall(r"\bst\.global\.v4\.b32", ptx)) == 1
        # Maxima of blocks alone are written by single words, and no reciprocal is approximated.
        assert len(re.findall(r"\bst\.global\.b32", ptx)) == 1
        assert "div.rn.f32" in ptx
        assert not re.search(r"div\.(full|approx)|rcp\.approx|\.ftz", ptx)
