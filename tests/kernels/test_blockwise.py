"""Quantize and dequantize in plain torch: what holds without any peer at hand."""

import math

import pytest
import torch

from qlora_kernels.blockwise import BLOCK_SIZES, dequantize_reference, offset_of, quantize
from qlora_kernels.levels import LEVELS, Kind, thresholds

ODD_SHAPES = [(1,), (3, 5), (7, 64), (65, 131)]


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def _codes(q) -> torch.Tensor:
    return torch.stack((q.codes >> 4, q.codes & 15), dim=-1).flatten()[: math.prod(q.shape)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_every_weight_gets_the_nearest_level_of_its_block(shape: tuple[int, ...], block_size: int, kind: Kind) -> None:
    weight = _normal(*shape)
    q = quantize(weight, kind=kind, block_size=block_size, double_quant=False)
    levels = torch.tensor(LEVELS[kind], dtype=torch.float64)
    missing = -weight.numel() % block_size
    blocks_SW = torch.nn.functional.pad(weight.double().flatten(), (0, missing)).view(-1, block_size)
    codes_SW = torch.nn.functional.pad(_codes(q), (0, missing), value=LEVELS[kind].index(0.0)).view(-1, block_size)
    largest_S = blocks_SW.abs().amax(dim=1)
    assert torch.equal(q.absmax.double(), largest_S)
    distances_SWL = (blocks_SW[:, :, None] / largest_S[:, None, None] - levels).abs()
    chosen_SW = distances_SWL.gather(2, codes_SW[:, :, None].long())[:, :, 0]
    assert (chosen_SW <= distances_SWL.amin(dim=2) + 1e-7).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_on_a_cut_takes_the_code_below_and_the_next_float_the_code_above(kind: Kind) -> None:
    cuts, codes = thresholds(kind)
    largest = torch.tensor([1.0])
    on = quantize(torch.cat((largest, cuts)), kind=kind)
    above = quantize(torch.cat((largest, cuts.nextafter(largest))), kind=kind)
    assert torch.equal(_codes(on)[1:], codes[:-1])
    assert torch.equal(_codes(above)[1:], codes[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_dequantize_is_level_times_scale_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q = quantize(_normal(*shape))
    group = torch.arange(q.absmax.numel()) // 256
    scale = q.nested_levels[q.absmax.long()] * q.nested_absmax[group]
    scale = scale + q.offset
    weight = q.levels[_codes(q).long()] * scale[torch.arange(math.prod(shape)) // 64]
    assert torch.equal(dequantize_reference(q, dtype), weight.view(shape).to(dtype))


@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_what_was_dequantized_quantizes_to_the_same_codes(block_size: int) -> None:
    q = quantize(_normal(33, 131), block_size=block_size, double_quant=False)
    again = quantize(dequantize_reference(q, torch.float32), block_size=block_size, double_quant=False)
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.absmax, q.absmax)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("n_zeros", [64, 128, 640, 700])
def test_blocks_of_zeros_come_back_as_exact_zeros(n_zeros: int, kind: Kind, double_quant: bool) -> None:
    weight = _normal(700)
    weight[:n_zeros] = 0
    dense = dequantize_reference(quantize(weight, kind=kind, double_quant=double_quant), torch.float32)
    assert (dense[:n_zeros] == 0).all()
    assert dense.isfinite().all()


def test_quantized_sizes_are_those_of_the_format() -> None:
    q = quantize(_normal(1000, 333))
    blocks = math.ceil(333_000 / 64)
    assert (q.codes.shape, q.codes.dtype) == ((166_500,), torch.uint8)
    assert (q.absmax.shape, q.absmax.dtype) == ((blocks,), torch.uint8)
    assert (q.nested_absmax.shape, q.nested_absmax.dtype) == ((math.ceil(blocks / 256),), torch.float32)
    assert (q.nested_levels.shape, q.levels.shape, q.offset.shape) == ((256,), (16,), ())
    assert all(part.is_contiguous() for part in (q.codes, q.absmax, q.nested_absmax))


def test_an_odd_last_weight_shares_its_byte_with_the_code_of_zero() -> None:
    assert quantize(_normal(65), kind="nf4").codes[-1].item() & 15 == 7
    assert quantize(_normal(65), kind="fp4").codes[-1].item() & 15 == 0


def test_error_on_normal_weights_is_the_known_one() -> None:
    weight = _normal(1024, 1024)
    for double_quant in (True, False):
        dense = dequantize_reference(quantize(weight, double_quant=double_quant), torch.float32)
        assert ((dense - weight).norm() / weight.norm()).item() == pytest.approx(0.0920, abs=0.0003)


def test_a_tensor_handled_in_pieces_equals_its_pieces() -> None:
    first, second = _normal(1 << 20, seed=1), _normal(3 * 64 + 5, seed=2)
    whole = quantize(torch.cat((first, second)), double_quant=False)
    parts = [quantize(part, double_quant=False) for part in (first, second)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.absmax, torch.cat([part.absmax for part in parts]))
    dense = [dequantize_reference(part, torch.bfloat16) for part in parts]
    assert torch.equal(dequantize_reference(whole, torch.bfloat16), torch.cat(dense))


@pytest.mark.parametrize("blocks", [1, 1000, 32_767, 34_376, 100_003])
def test_the_offset_is_the_mean_under_one_thread_whatever_their_number(blocks: int) -> None:
    # Torch shares out a sum of 32,768 and more.
    scales = [_normal(blocks, seed=seed).abs() + 0.01 for seed in range(5)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = [values.mean() for values in scales]
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert [offset_of(values) for values in scales] == wanted
            assert torch.get_num_threads() == threads
        torch.set_num_threads(2)
        naive = [values.mean() for values in scales]
    finally:
        torch.set_num_threads(before)
    # The control: with two threads a plain mean differs for at least one of these.
    assert (naive == wanted) == (blocks < 32_768)


def test_the_bytes_do_not_depend_on_the_number_of_threads() -> None:
    # Enough blocks for torch to share out their sum, each of one magnitude.
    weight = (_normal(34_376).abs() + 0.01).repeat_interleave(32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = quantize(weight, block_size=32)
        torch.set_num_threads(2)
        shared = quantize(weight, block_size=32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone[:6], shared[:6], strict=True))


def test_a_strided_weight_quantizes_like_its_contiguous_copy() -> None:
    weight = _normal(40, 70).T
    assert torch.equal(quantize(weight).codes, quantize(weight.contiguous()).codes)


def test_a_preallocated_output_is_filled_to_the_last_element() -> None:
    q = quantize(_normal(33, 131))
    out = torch.full((33, 131), math.nan)
    assert dequantize_reference(q, torch.float32, out=out) is out
    assert torch.equal(out, dequantize_reference(q, torch.float32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 63, 64, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nan_and_infinity_are_refused_wherever_they_stand(dtype: torch.dtype, position: int, bad: float) -> None:
    weight = _normal(130).to(dtype)
    weight[position] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight)


def test_scales_whose_mean_overflows_are_refused_under_double_quantization() -> None:
    weight = torch.full((640,), 3e38)
    with pytest.raises(ValueError, match="exceeds float32's range"):
        quantize(weight)
    assert torch.equal(dequantize_reference(quantize(weight, double_quant=False), torch.float32), weight)


@pytest.mark.parametrize(
    ("weight", "block_size", "message"),
    [
        (torch.zeros(4, dtype=torch.float64), 64, "float64"),
        (torch.zeros(4, dtype=torch.int32), 64, "int32"),
        (torch.zeros(4), 16, "32, 64, 128"),
        (torch.zeros(4), 96, "32, 64, 128"),
        (torch.zeros(0, 3), 64, "without elements"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(weight: torch.Tensor, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, block_size=block_size)
