"""The quantize kernels against the reference."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qlora_kernels import blockwise, quantize
from qlora_kernels.levels import Kind, thresholds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOT_FINITE = "cannot quantize a tensor that holds NaN or infinity"


@pytest.fixture(autouse=True)
def _new_memory_holds_nonsense() -> Iterator[None]:
    """`torch.empty` gives NaN and 255, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def _assert_kernel_equals_reference(
    weight: Tensor, *, kind: Kind = "nf4", block_size: int = 64, double_quant: bool = True
) -> None:
    found = quantize(weight.to(DEVICE), kind=kind, block_size=block_size, double_quant=double_quant)
    wanted = blockwise.quantize(weight, kind=kind, block_size=block_size, double_quant=double_quant)
    for name, ours, reference in zip(wanted._fields, found, wanted, strict=True):
        if isinstance(reference, Tensor):
            assert ours.device.type == DEVICE.type, name
            torch.testing.assert_close(ours.cpu(), reference, rtol=0, atol=0, msg=lambda text, name=name: name + text)
        else:
            assert ours == reference, name


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))).mul_(0.02).to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
# A last block that is not whole, alone and behind others; blocks that end with a tile and, but for 4096, within one.
@pytest.mark.parametrize("n", [1, 8191, 8192, 4096 + 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_equals_the_reference(dtype: torch.dtype, n: int, block_size: int, kind: Kind) -> None:
    _assert_kernel_equals_reference(_random(n, dtype=dtype), kind=kind, block_size=block_size)


def test_scales_may_stay_in_float32() -> None:
    _assert_kernel_equals_reference(_random(77, 101), double_quant=False)


def test_more_scales_than_a_group_and_than_torch_adds_in_one_go() -> None:
    _assert_kernel_equals_reference(_random(1099, 97).abs_(), block_size=32)


def test_rows_need_not_be_contiguous() -> None:
    _assert_kernel_equals_reference(_random(48, 130)[:, ::2].T)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("rest", [0, 47], ids="rest={}".format)
def test_weights_on_a_cut_and_beside_it(kind: Kind, rest: int) -> None:
    cuts = torch.cat((thresholds(kind)[0], torch.tensor([-1.0, 1.0, 0.0, -0.0])))
    weights = torch.cat((cuts, cuts.nextafter(torch.tensor(2.0)), cuts.nextafter(torch.tensor(-2.0))))
    # Blocks whose maximum is 1, so that weights are their own scaled values; then one whose division is not exact.
    blocks = torch.zeros(2 * 64 + rest)
    blocks[: weights.numel()] = weights.clamp(-1.0, 1.0)
    blocks[64 : 64 + weights.numel()] = weights * 0.7
    blocks[128:] = weights[:rest] * 3.1
    _assert_kernel_equals_reference(blocks, kind=kind)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_float16_below_one(kind: Kind) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    weights = bits.view(torch.float16)
    weights = weights[weights.abs() <= 1].sort().values
    _assert_kernel_equals_reference(torch.nn.functional.pad(weights, (0, -weights.numel() % 4096)), kind=kind)
    # Each with a whole one in its block, so that no scale is another.
    blocks = torch.nn.functional.pad(weights, (0, -weights.numel() % 63)).view(-1, 63)
    _assert_kernel_equals_reference(torch.nn.functional.pad(blocks, (1, 0), value=1.0), kind=kind)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("n", [4 * 64, 4 * 64 + 5])
def test_zeros_subnormal_and_huge_numbers(n: int, double_quant: bool) -> None:
    weight = torch.zeros(n)
    weight[64:128] = torch.linspace(-3e-39, 2e-39, 64)
    weight[128:192] = torch.linspace(-3.0, 1.0, 64) * 1e38
    weight[192:256] = torch.linspace(-1e-3, 1e6, 64)
    weight[192] = 1e-45
    _assert_kernel_equals_reference(weight, double_quant=double_quant)
    _assert_kernel_equals_reference(weight, kind="fp4", double_quant=double_quant)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 0.37])
def test_scales_that_are_all_alike(scale: float) -> None:
    _assert_kernel_equals_reference(torch.full((70 * 64,), scale))
    _assert_kernel_equals_reference(torch.cat((torch.full((300 * 64,), scale), torch.tensor([1e-42]))))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("position", [0, 4999, 5000, 5003])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float, position: int, double_quant: bool) -> None:
    weight = _random(5004)
    weight[position] = value
    with pytest.raises(ValueError, match=NOT_FINITE):
        quantize(weight.to(DEVICE), double_quant=double_quant)


def test_scales_whose_mean_overflows_are_refused() -> None:
    with pytest.raises(ValueError, match="the mean of the block maxima exceeds float32's range"):
        quantize(torch.full((256,), 3e38, device=DEVICE))


@pytest.mark.parametrize(
    ("weight", "block_size", "complaint"),
    [
        (torch.ones(64, dtype=torch.float64), 64, "float64"),
        (torch.ones(64), 48, "blocks of 48"),
        (torch.ones(0), 64, "without elements"),
    ],
    ids=["dtype", "block size", "empty"],
)
def test_what_the_format_cannot_hold_is_refused(weight: Tensor, block_size: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        quantize(weight.to(DEVICE), block_size=block_size)


def test_the_front_door_leads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kernels import quantize_triton

    calls = []
    monkeypatch.setattr(quantize_triton, "quantize_triton", lambda weight, **settings: calls.append(settings))
    quantize(torch.ones(64, device=DEVICE), kind="fp4", block_size=32, double_quant=False)
    assert calls == [{"kind": "fp4", "block_size": 32, "double_quant": False}]
