"""The kernels for products of a few rows against float64."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qlora_kernels import QuantizedTensor, dequantize_reference, quantize, quantized_matmul, serves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter gets products in bfloat16 wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def _random(
    rows: int,
    length: int,
    *,
    block_size: int = 64,
    nested_block_size: int | None = 256,
    kind: str = "nf4",
    seed: int = 0,
) -> QuantizedTensor:
    """Every byte and every scale code may occur, unlike in what `quantize` makes of random weights."""
    generator = torch.Generator().manual_seed(seed)
    n = rows * length
    blocks = math.ceil(n / block_size)
    model = quantize(torch.randn(64, generator=generator), kind=kind)
    codes = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    if nested_block_size is None:
        scales = torch.randn(blocks, generator=generator)
        return QuantizedTensor(codes, scales, model.levels, None, None, None, block_size, 256, (rows, length))
    return model._replace(
        codes=codes,
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
        nested_absmax=torch.rand(math.ceil(blocks / nested_block_size), generator=generator),
        block_size=block_size,
        nested_block_size=nested_block_size,
        shape=(rows, length),
    )


def _on_device(q: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(*(part.to(DEVICE) if isinstance(part, Tensor) else part for part in q))


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _check(x: Tensor, weights: Sequence[QuantizedTensor]) -> list[Tensor]:
    outs = [torch.full((*x.shape[:-1], q.shape[0]), math.nan, dtype=x.dtype, device=DEVICE) for q in weights]
    on_device = [_on_device(q) for q in weights]
    assert serves(x.to(DEVICE), on_device)
    quantized_matmul(x.to(DEVICE), on_device, outs=outs)
    for out, q in zip(outs, weights, strict=True):
        weight = dequantize_reference(q, torch.float32).double()
        wanted, sizes = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        # Each addition rounds once, in whatever order; a weight and a product may be rounded too, to x's dtype in
        # 16 bits.
        bound = 1.01 * (x.shape[-1] + 2) * torch.finfo(torch.float32).eps / 2 * sizes
        half_ulp = torch.finfo(x.dtype).eps / 2
        bound += half_ulp * sizes + (wanted.abs() + bound) * half_ulp + torch.finfo(x.dtype).smallest_normal
        excess = ((out.cpu().double() - wanted).abs() - bound).max()
        assert excess <= 0, f"{excess} beyond the bound"
    return outs


@pytest.mark.parametrize("nested_block_size", [None, 3], ids="nested={}".format)
@pytest.mark.parametrize(("length", "block_size"), [(1, 64), (33, 32), (96, 64), (160, 128), (257, 64), (64, 4096)])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_may_run_across_rows(
    dtype: torch.dtype, rows: int, length: int, block_size: int, nested_block_size: int | None
) -> None:
    _check(
        _x(rows, length, dtype=dtype), [_random(21, length, block_size=block_size, nested_block_size=nested_block_size)]
    )


@pytest.mark.parametrize("rows", [2, 8, 16, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_up_to_64_rows_are_multiplied(dtype: torch.dtype, rows: int) -> None:
    _check(_x(rows, 128, dtype=dtype), [_random(37, 128)])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_weights_share_their_input(dtype: torch.dtype, count: int, rows: int) -> None:
    heights = (5, 70, 1, 33, 2)[:count]
    kinds = ("nf4", "fp4", "nf4", "fp4", "nf4")
    _check(
        _x(rows, 96, dtype=dtype),
        [_random(height, 96, kind=kind, seed=height) for height, kind in zip(heights, kinds, strict=False)],
    )


def test_weights_of_one_form_go_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kernels import quantized_matmul_triton as module

    launches = []
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda x, pairs: launches.append(len(pairs)) or launch(x, pairs))
    same = [_random(rows, 64, seed=rows) for rows in (3, 4, 5)]
    _check(_x(1, 64), same)
    assert launches == [3]
    _check(_x(1, 64), [*same, *same, _random(3, 64, block_size=32), _random(3, 64, nested_block_size=None)])
    assert launches == [3, 4, 2, 1, 1]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_longer_than_a_tile_is_multiplied(rows: int) -> None:
    _check(_x(rows, 32 * 128 + 32), [_random(3, 32 * 128 + 32)])
    _check(_x(rows, 32 * 128 + 33, dtype=torch.float16), [_random(3, 32 * 128 + 33)])


def test_codes_at_an_odd_address_are_read_byte_by_byte() -> None:
    q, x = _random(5, 128), _x(2, 128).to(DEVICE)
    wanted = quantized_matmul(x, [_on_device(q)])[0]
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), q.codes)).to(DEVICE)[1:]
    torch.testing.assert_close(quantized_matmul(x, [_on_device(q)._replace(codes=shifted)])[0], wanted)


def test_the_same_call_gives_the_same_bits() -> None:
    x, weights = _x(3, 128, dtype=torch.float16), [_random(50, 128), _random(20, 128, seed=1)]
    first = _check(x, weights)
    assert all(torch.equal(a, b) for a, b in zip(_check(x, weights), first, strict=True))
