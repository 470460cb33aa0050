"""The door in front of the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_kernels import dequantize, dequantize_reference, quantize

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def _quantized():
    return quantize(torch.randn(33, 131, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_on_a_cpu_the_answer_is_the_references(dtype: torch.dtype) -> None:
    q = _quantized()
    dense = dequantize(q, dtype)
    assert (dense.dtype, dense.shape) == (dtype, (33, 131))
    assert torch.equal(dense, dequantize_reference(q, dtype))


def test_float64_holds_the_float32_values() -> None:
    q = _quantized()
    assert torch.equal(dequantize(q, torch.float64), dequantize(q, torch.float32).double())


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(33, 130),
        torch.empty(33, 131, dtype=torch.bfloat16),
        torch.empty(131, 33).T,
        torch.empty(33, 131, device="meta"),
    ],
    ids=["shape", "dtype", "layout", "device"],
)
def test_an_output_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"it must be a contiguous torch.float32 tensor of shape \[33, 131\] on cpu"):
        dequantize(_quantized(), torch.float32, out=out)


def test_an_integer_result_is_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        dequantize(_quantized(), torch.int32)


def test_a_cpu_needs_no_triton() -> None:
    without_triton = (
        "import sys; sys.modules['triton'] = None; import torch; from qlora_kernels import dequantize, quantize;"
        "print(dequantize(quantize(torch.ones(3)), torch.float32).tolist())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", without_triton],
        env=environment | {"PYTHONPATH": str(KERNELS)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[1.0, 1.0, 1.0]"
