"""The dequantize kernel against the reference."""

import math

import pytest
import torch

from qlora_kernels import QuantizedTensor, blockwise, dequantize, dequantize_reference, lora_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _random(n: int, *, block_size: int, nested_block_size: int | None) -> QuantizedTensor:
    """Every byte, scale code and size may occur, unlike in what `quantize` makes of random weights."""
    generator = torch.Generator().manual_seed(n)
    scales = math.ceil(n / block_size)
    model = blockwise.quantize(torch.randn(max(n, 2), generator=generator), block_size=block_size)
    codes = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    if nested_block_size is None:
        absmax = torch.rand(scales, generator=generator)
        return QuantizedTensor(codes, absmax, model.levels, None, None, None, block_size, 256, (n,))
    return model._replace(
        codes=codes,
        absmax=torch.randint(0, 256, (scales,), dtype=torch.uint8, generator=generator),
        nested_absmax=torch.rand(math.ceil(scales / nested_block_size), generator=generator),
        nested_block_size=nested_block_size,
        shape=(n,),
    )


def _on_device(q: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(*(part.to(DEVICE) if isinstance(part, torch.Tensor) else part for part in q))


def _assert_kernel_equals_reference(q: QuantizedTensor, dtype: torch.dtype) -> None:
    out = torch.full(q.shape, math.nan, dtype=dtype, device=DEVICE)
    assert dequantize(_on_device(q), dtype, out=out) is out
    torch.testing.assert_close(out.cpu(), dequantize_reference(q, dtype), rtol=0, atol=0)


# Without double quantization; one group for a whole tile; several for a tile, and of a size that is no power of two.
@pytest.mark.parametrize("nested_block_size", [None, 256, 12], ids="nested={}".format)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
# Ragged, and whole blocks that end with a tile or, but for those of 4096, within one.
@pytest.mark.parametrize("n", [1, 8191, 8192, 4096 + 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_equals_the_reference(
    dtype: torch.dtype, n: int, block_size: int, nested_block_size: int | None
) -> None:
    _assert_kernel_equals_reference(_random(n, block_size=block_size, nested_block_size=nested_block_size), dtype)


@pytest.mark.parametrize("n", [4097, 4160])
def test_kernel_widens_to_float64(n: int) -> None:
    _assert_kernel_equals_reference(_random(n, block_size=64, nested_block_size=256), torch.float64)


@pytest.mark.parametrize("shift", [1, 4])
def test_codes_may_lie_at_any_address(shift: int) -> None:
    q = _random(4096 + 64, block_size=64, nested_block_size=256)
    storage = torch.empty(shift + q.codes.numel(), dtype=torch.uint8, device=DEVICE)
    codes = storage[shift:].copy_(q.codes)
    assert codes.data_ptr() % 16
    out = torch.full(q.shape, math.nan, device=DEVICE)
    dequantize(_on_device(q)._replace(codes=codes), torch.float32, out=out)
    torch.testing.assert_close(out.cpu(), dequantize_reference(q, torch.float32), rtol=0, atol=0)


def test_the_output_may_lie_at_any_address() -> None:
    q = _random(4096 + 64, block_size=64, nested_block_size=256)
    out = torch.full((q.shape[0] + 1,), math.nan, dtype=torch.float16, device=DEVICE)[1:]
    dequantize(_on_device(q), torch.float16, out=out)
    torch.testing.assert_close(out.cpu(), dequantize_reference(q, torch.float16), rtol=0, atol=0)


def test_nothing_is_written_behind_the_last_weight() -> None:
    for n in (4096 + 64, 4097):
        q = _random(n, block_size=64, nested_block_size=256)
        storage = torch.full((2 * n,), math.nan, device=DEVICE)
        dequantize(_on_device(q), torch.float32, out=storage[:n])
        assert storage[n:].isnan().all()


def test_kernel_knows_fp4() -> None:
    q = blockwise.quantize(torch.randn(5, 997, generator=torch.Generator().manual_seed(0)), kind="fp4")
    _assert_kernel_equals_reference(q, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernel_rounds_ties_to_even_and_keeps_tiny_and_huge_values(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    ties = [sign * (1 + step * (k + 0.5)) for k in range(4) for sign in (1.0, -1.0)]
    levels = torch.tensor([*ties, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 65504.0, 65520.0, 3.39e38])
    codes = torch.randint(0, 256, (100,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    q = QuantizedTensor(codes, torch.tensor([1.0, 1.0, 1.0, 1.0]), levels, None, None, None, 64, 256, (199,))
    _assert_kernel_equals_reference(q, dtype)


def test_a_linear_layer_runs_the_kernel_once_forward_and_once_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kernels import dequantize_triton

    launches = []
    launch = dequantize_triton.dequantize_triton
    monkeypatch.setattr(
        dequantize_triton, "dequantize_triton", lambda q, dtype, *, out: launches.append(q) or launch(q, dtype, out=out)
    )
    q = _on_device(blockwise.quantize(torch.randn(24, 40)))
    x = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    y = lora_linear(x, q)
    assert len(launches) == 1
    y.sum().backward()
    assert len(launches) == 2
