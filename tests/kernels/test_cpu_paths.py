"""Every path of the C kernels against the reference in plain torch, bit for bit."""

import math
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kernels import (
    BLOCK_SIZES,
    QuantizedTensor,
    blockwise,
    cpu,
    dequantize,
    dequantize_reference,
    library,
    quantize,
)
from qlora_kernels.levels import Kind, levels_of, thresholds
from tests.kernels.paths import DTYPES, PATHS, SOURCES, assert_same, bits, forced, normal, walled

pytestmark = pytest.mark.skipif(not PATHS, reason="the C kernels are not built")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param):
        yield request.param


def _assert_quantizes_alike(weight: torch.Tensor, **settings) -> None:
    settings = {"kind": "nf4", "block_size": 64, "double_quant": True} | settings
    assert_same(quantize(weight, **settings), blockwise.quantize(weight, **settings))


def _assert_dequantizes_alike(q: QuantizedTensor, dtype: torch.dtype) -> None:
    out = torch.full(q.shape, math.nan, dtype=dtype)
    assert dequantize(q, dtype, out=out) is out
    torch.testing.assert_close(out, dequantize_reference(q, dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_equals_the_reference(
    path: str, block_size: int, kind: Kind, double_quant: bool, dtype: torch.dtype
) -> None:
    for n in (1, 2, 31, 33, 4095, 4096, 12_345, 8 * block_size, 9 * block_size - 1):
        weight = normal(n, seed=n, dtype=dtype)
        _assert_quantizes_alike(weight, kind=kind, block_size=block_size, double_quant=double_quant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested_block_size", [None, 256, 64], ids="nested={}".format)
@pytest.mark.parametrize("block_size", [2, 4, 6, 8, 16, 34, 96, *BLOCK_SIZES, 65_536])
def test_dequantize_equals_the_reference_for_any_codes(
    path: str, block_size: int, nested_block_size: int | None, dtype: torch.dtype
) -> None:
    for n in (1, 2, 31, 33, 70_001):
        _assert_dequantizes_alike(_random(n, block_size=block_size, nested_block_size=nested_block_size), dtype)


def _random(n: int, *, block_size: int, nested_block_size: int | None) -> QuantizedTensor:
    """Every byte, scale code and size may occur, unlike in what `quantize` makes of random weights."""
    generator = torch.Generator().manual_seed(n)
    blocks = math.ceil(n / block_size)
    codes = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    levels = levels_of("nf4")
    if nested_block_size is None:
        scales = torch.randn(blocks, generator=generator)
        return QuantizedTensor(codes, scales, levels, None, None, None, block_size, 256, (n,))
    return QuantizedTensor(
        codes,
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
        levels,
        torch.rand(math.ceil(blocks / nested_block_size), generator=generator),
        torch.randn(256, generator=generator),
        torch.rand((), generator=generator),
        block_size,
        nested_block_size,
        (n,),
    )


@settings(max_examples=100, deadline=None, database=None)
@given(
    path=st.sampled_from(PATHS or [None]),
    n=st.integers(1, 9000),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    exponents=st.lists(st.integers(-150, 127), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_tensors_of_any_size_and_magnitude_go_there_and_back_alike(
    *, path, n, dtype, kind, block_size, double_quant, zeros, exponents, seed
) -> None:
    limit = {torch.float32: 127, torch.bfloat16: 127, torch.float16: 15}[dtype]
    powers = torch.tensor([min(exponent, limit) for exponent in exponents], dtype=torch.float64).exp2()
    weight = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    weight = (weight * powers.repeat_interleave(-(-n // len(powers)))[:n]).to(dtype)
    weight[: int(n * zeros)] = 0
    try:
        wanted = blockwise.quantize(weight, kind=kind, block_size=block_size, double_quant=double_quant)
    except ValueError as fault:
        with forced(path), pytest.raises(ValueError, match=str(fault)):
            quantize(weight, kind=kind, block_size=block_size, double_quant=double_quant)
        return
    with forced(path):
        assert_same(quantize(weight, kind=kind, block_size=block_size, double_quant=double_quant), wanted)
        for out in DTYPES:
            _assert_dequantizes_alike(wanted, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_finite_16_bit_number_is_quantized_alike(path: str, kind: Kind, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    assert finite.numel() == {torch.float16: 63_488, torch.bfloat16: 65_280}[dtype]
    # In their own order the numbers of a block are of one magnitude; shuffled, the largest of a block is.
    shuffled = finite[torch.randperm(finite.numel(), generator=torch.Generator().manual_seed(0))]
    for weight in (finite, shuffled, finite[1:]):
        _assert_quantizes_alike(weight, kind=kind, double_quant=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_scale_is_rounded_alike(path: str, dtype: torch.dtype) -> None:
    # All signs and exponents, with subnormal numbers, infinity and NaN, and all roundings in the last bits kept.
    top = torch.arange(1 << 16, dtype=torch.int32) << 16
    low = torch.tensor([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001], dtype=torch.int32)
    scales = (top | low.repeat(top.numel() // low.numel())).view(torch.float32)
    codes = torch.arange(256, dtype=torch.uint8).repeat(scales.numel() * 16 // 256)
    for part in (slice(None), slice(1, None)):
        here = scales[part]
        q = QuantizedTensor(
            codes[: here.numel() * 16], here, levels_of("nf4"), None, None, None, 32, 256, (here.numel() * 32,)
        )
        _assert_dequantizes_alike(q, dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_on_and_beside_the_cuts_are_quantized_alike(path: str, kind: Kind) -> None:
    cuts, _ = thresholds(kind)
    beside = torch.cat((cuts, cuts.nextafter(torch.tensor(-2.0)), cuts.nextafter(torch.tensor(2.0))))
    block = torch.cat((torch.tensor([1.0]), beside, torch.linspace(-1, 1, 18)))
    assert block.numel() == 64
    generator = torch.Generator().manual_seed(0)
    # A power of two leaves the scaled weights as they are; other sizes round them to and from the cuts.
    sizes = torch.cat((torch.ones(1), torch.rand(500, generator=generator) + 1e-3))
    weight = (sizes[:, None] * block).view(-1)
    _assert_quantizes_alike(weight, kind=kind, double_quant=False)
    _assert_quantizes_alike(weight[: 64 * 500 + 63], kind=kind, double_quant=False)


def test_scales_near_the_midpoints_of_their_codes_are_quantized_alike(path: str) -> None:
    scales = torch.rand(100_001, generator=torch.Generator().manual_seed(0)) + 0.01
    _assert_quantizes_alike(scales.repeat_interleave(32), block_size=32)


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="torch's vectors are of another width"
)
def test_scales_are_summed_in_torchs_order() -> None:
    assert cpu._sums_as_torch_does()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = [*range(8, 600), *(2**power + offset for power in range(10, 21) for offset in (-1, 0, 1)), 5_000_001]
        for n in sizes:
            values = torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.01
            assert library.sum_in_torchs_order(values.data_ptr(), n) == values.sum().item(), n
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("blocks", [1000, 32_767, 32_768, 100_003])
def test_the_offset_is_the_references_with_or_without_torchs_order(
    path: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (normal(blocks).abs() + 0.01).repeat_interleave(32)
    _assert_quantizes_alike(weight, block_size=32)
    monkeypatch.setattr(cpu, "_sums_as_torch_does", lambda: False)
    _assert_quantizes_alike(weight, block_size=32)


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1.0])
def test_scales_that_are_all_the_same_are_quantized_alike(path: str, magnitude: float) -> None:
    _assert_quantizes_alike(torch.full((64 * 300 + 5,), magnitude))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_are_refused_wherever_they_stand(path: str, dtype: torch.dtype) -> None:
    weight = normal(64 * 2 + 5, dtype=dtype)
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        for position in range(weight.numel()):
            spoilt = weight.clone()
            spoilt[position] = bad
            with pytest.raises(ValueError, match="NaN or infinity"):
                quantize(spoilt)


def test_scales_whose_mean_overflows_are_refused_under_double_quantization(path: str) -> None:
    weight = torch.full((640,), 3e38)
    with pytest.raises(ValueError, match="exceeds float32's range"):
        quantize(weight)
    _assert_quantizes_alike(weight, double_quant=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 33, 4096 + 64, 4096 + 63])
def test_nothing_is_touched_beyond_the_ends(
    path: str, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = walled(n, dtype).copy_(normal(n, dtype=dtype))
    wanted = blockwise.quantize(weight)
    outputs = []

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: str) -> torch.Tensor:
        outputs.append(walled(math.prod(shape), dtype))
        return outputs[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        found = quantize(weight)
    assert len(outputs) == 4
    assert_same(found, wanted)
    parts = [walled(part.numel(), part.dtype).copy_(part.view(-1)) for part in wanted[:6]]
    q = QuantizedTensor(*parts[:5], parts[5][0], *wanted[6:])
    for out_dtype in DTYPES:
        out = walled(n, out_dtype)
        assert torch.equal(dequantize(q, out_dtype, out=out), dequantize_reference(wanted, out_dtype))
        # And nothing before the start, seen from the middle of a larger tensor.
        large = torch.full((n + 64,), math.nan, dtype=out_dtype)
        dequantize(q, out_dtype, out=large[32:-32])
        assert large[:32].isnan().all()
        assert large[-32:].isnan().all()
        assert torch.equal(large[32:-32], out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_need_not_be_aligned(path: str, dtype: torch.dtype) -> None:
    weight = normal(5001, dtype=dtype)
    wanted = blockwise.quantize(weight)
    for offset in (1, 2, 3):
        memory = bytearray(offset) + bytearray(bits(weight).numpy().tobytes())
        assert_same(quantize(torch.frombuffer(memory, dtype=dtype, offset=offset)), wanted)
        memory = bytearray(offset + 5001 * dtype.itemsize)
        out = torch.frombuffer(memory, dtype=dtype, offset=offset)
        dequantize(wanted, dtype, out=out)
        assert torch.equal(out.clone(), dequantize_reference(wanted, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_results_that_are_written_past_the_caches_are_the_same(path: str, dtype: torch.dtype) -> None:
    n = (9 << 20) // dtype.itemsize + 33
    q = _random(n, block_size=64, nested_block_size=256)
    whole = torch.full((n + 1,), math.nan, dtype=dtype)
    # Aligned to 64 bytes, as torch allocates, and not.
    for out in (whole[:-1], whole[1:]):
        whole.fill_(math.nan)
        dequantize(q, dtype, out=out)
        assert torch.equal(out, dequantize_reference(q, dtype))
        assert whole.isnan().sum() == 1


def test_a_caller_that_flushes_subnormal_numbers_gets_the_same_bits(path: str) -> None:
    weight = (torch.linspace(-1, 1, 600, dtype=torch.float64) * 1.1e-38).float()
    wanted = blockwise.quantize(weight, double_quant=False)
    dense = dequantize_reference(wanted, torch.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        found = quantize(weight, double_quant=False)
        back = dequantize(wanted, torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, wanted)
    assert torch.equal(bits(back), bits(dense))
    assert (dense != 0).sum() > 500


def test_any_number_of_threads_gives_the_same_bits(path: str) -> None:
    weight = normal(3_000_001, dtype=torch.bfloat16)
    wanted = blockwise.quantize(weight)
    dense = dequantize_reference(wanted, torch.float16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert_same(quantize(weight), wanted)
            assert torch.equal(dequantize(wanted, torch.float16), dense)
    finally:
        torch.set_num_threads(before)


def test_a_weight_that_is_not_finite_is_refused_by_whichever_thread_finds_it(path: str) -> None:
    weight = torch.zeros(3_000_000)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for position in (0, 1_500_000, 2_999_999):
            weight[position] = math.nan
            with pytest.raises(ValueError, match="NaN or infinity"):
                quantize(weight)
            weight[position] = 0
    finally:
        torch.set_num_threads(before)


def test_many_threads_may_call_at_once(path: str) -> None:
    weights = [normal(700_001, seed=seed) for seed in range(6)]
    wanted = [blockwise.quantize(weight) for weight in weights]
    dense = [dequantize_reference(q, torch.bfloat16) for q in wanted]
    faults = []

    def run(number: int) -> None:
        torch.set_num_threads(3)
        for _ in range(5):
            q = quantize(weights[number])
            if not all(torch.equal(a, b) for a, b in zip(q[:6], wanted[number][:6], strict=True)):
                faults.append(number)
            if not torch.equal(dequantize(q, torch.bfloat16), dense[number]):
                faults.append(number)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert faults == []


def test_a_forked_child_starts_threads_of_its_own() -> None:
    code = (
        "import os, torch\n"
        "from qlora_kernels import quantize\n"
        "torch.set_num_threads(3)\n"
        "weight = torch.linspace(-1, 1, 1_000_001)\n"
        "before = quantize(weight, double_quant=False)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    after = quantize(weight, double_quant=False)\n"
        # Not by torch: its own threads do not survive a fork.
        "    os._exit(0 if before.codes.numpy().tobytes() == after.codes.numpy().tobytes() else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=SOURCES.parent, timeout=60, check=False, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
