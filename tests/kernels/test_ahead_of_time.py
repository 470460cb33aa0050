"""Kernels compile for real GPUs on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists on Linux only")
def test_every_kernel_compiles_for_sm_80_and_sm_90_without_spills(tmp_path: Path) -> None:
    # A process of its own, since compiling is impossible in one with TRITON_INTERPRET=1, and an empty cache.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kernels.ahead_of_time"],
        env=environment | {"PYTHONPATH": str(KERNELS), "TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    for capability in (80, 90):
        kernels = {row["kernel"] for row in compiled if row["capability"] == capability}
        assert {f"dequantize_{dtype}_double_quant_block64" for dtype in ("fp32", "fp16", "bf16")} <= kernels
        assert {
            f"quantized_matmul_{dtype}_m{m}_weights3_double_quant"
            for dtype in ("fp32", "fp16", "bf16")
            for m in (1, 64)
        } <= kernels
    for row in compiled:
        assert row["cubin_bytes"] > 0, row
        # A product keeps a row's running sums and the weights that meet them; 255 is all there is.
        limit = 64 if row["kernel"].startswith("dequantize") else 255
        assert 0 < row["registers"] <= limit, row
        assert row["stack_bytes"] == row["local_bytes"] == 0, f"registers spill to memory: {row}"
