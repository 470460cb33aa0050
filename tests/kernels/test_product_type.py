"""On a processor without 16-bit products they run in float32, and come out closer, never further off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_kernels import frozen_head, head_loss, linear, lora_linear, product_type, quantize

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@pytest.fixture
def no_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(x: torch.Tensor) -> torch.dtype:
        return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype

    for module in (frozen_head, linear):
        monkeypatch.setattr(module, "product_type", wide)


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("words", [3, 1000])
def test_a_head_in_strips_gives_loss_and_gradient(
    no_16_bit_products: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, words: int
) -> None:
    monkeypatch.setattr(frozen_head, "_STRIP_BYTES", words * 4 * 24)
    hidden, head = drawn(13, 24, seed=1, dtype=dtype).requires_grad_(), drawn(37, 24, seed=2, dtype=dtype)
    labels = torch.randint(37, (13,), generator=torch.Generator().manual_seed(3))
    loss = head_loss(hidden, head, labels)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact @ head.double().T, labels, reduction="sum")
    wanted.backward()
    # The logits are rounded to the head's own type.
    assert abs(float(loss - wanted)) <= 2 * torch.finfo(dtype).eps * 13 * float((exact @ head.double().T).abs().max())
    assert off(hidden.grad, exact.grad) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_rounds_once(no_16_bit_products: None, dtype: torch.dtype) -> None:
    weight, x = quantize(drawn(24, 96, seed=4, dtype=torch.float32)), drawn(7, 96, seed=5, dtype=dtype).requires_grad_()
    a, b = (drawn(*shape, seed=6, dtype=torch.float32).requires_grad_() for shape in ((3, 96), (24, 3)))
    y = lora_linear(x, weight, lora_a=a, lora_b=b, scale=0.5)
    y.sum().backward()
    from qlora_kernels import dequantize

    dense = dequantize(weight, torch.float64)
    x64, a64, b64 = (part.detach().double().requires_grad_() for part in (x, a, b))
    wanted = x64 @ dense.T + 0.5 * x64 @ a64.T @ b64.T
    wanted.sum().backward()
    assert off(y, wanted) <= torch.finfo(dtype).eps / 2
    for found, exact in ((x.grad, x64.grad), (a.grad, a64.grad), (b.grad, b64.grad)):
        assert off(found, exact) <= torch.finfo(dtype).eps


def test_other_types_and_devices_keep_their_own() -> None:
    assert product_type.product_type(torch.empty(1)) == torch.float32
    assert product_type.product_type(torch.empty(1, dtype=torch.float64)) == torch.float64
    assert product_type.product_type(torch.empty(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16


def test_a_processor_held_to_avx2_multiplies_in_float32() -> None:
    program = (
        "import torch; from qlora_kernels.product_type import product_type\n"
        "print(*(product_type(torch.empty(1, dtype=d)) for d in (torch.bfloat16, torch.float16)))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch.float32", "torch.float32"]
