"""Bit identity with bitsandbytes on a CPU at one thread, both ways, by every path that this processor has.

Its CUDA kernels are other code; nothing is claimed about how those quantize.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kernels import BLOCK_SIZES, QuantizedTensor, cpu, dequantize, quantize
from qlora_kernels.levels import Kind, dynamic_map, levels_of, thresholds

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the peer is not installed")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # The peer compiles its plain path, anew for each shape, unless told not to.
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


@contextmanager
def _forced(path: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {cpu.VARIABLE: path}):
        yield


def _assert_identical(weight: torch.Tensor, *, kind: Kind, block_size: int, double_quant: bool) -> None:
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=double_quant
    )
    for path in cpu.paths():
        with _forced(path):
            ours = quantize(weight, kind=kind, block_size=block_size, double_quant=double_quant)
        _assert_same_parts(ours, codes, state, double_quant=double_quant)
    # A last dimension of one sends the peer down its plain path: the vector code it has for some processors mixes up
    # scales where a block spans rows.
    state.shape = (weight.numel(), 1)
    theirs = bitsandbytes.functional.dequantize_4bit(codes, state)
    for path in cpu.paths():
        with _forced(path):
            assert torch.equal(_bits(dequantize(ours, weight.dtype)), _bits(theirs)), path


def _assert_same_parts(ours: QuantizedTensor, codes: torch.Tensor, state: Any, *, double_quant: bool) -> None:
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(_bits(ours.absmax), _bits(state.absmax))
    assert torch.equal(_bits(ours.levels), _bits(state.code))
    if double_quant:
        assert torch.equal(_bits(ours.nested_absmax), _bits(state.state2.absmax))
        assert torch.equal(_bits(ours.nested_levels), _bits(state.state2.code))
        assert torch.equal(_bits(ours.offset), _bits(state.offset))
        assert ours.nested_block_size == state.state2.blocksize


def test_levels_and_the_dynamic_map_have_the_peers_bits() -> None:
    assert torch.equal(_bits(dynamic_map()), _bits(bitsandbytes.functional.create_dynamic_map()))
    for kind in ("nf4", "fp4"):
        theirs = bitsandbytes.functional.get_4bit_type(kind, device="cpu")
        assert torch.equal(_bits(levels_of(kind)), _bits(theirs))


@settings(max_examples=80, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 300)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    exponent=st.integers(-4, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tensor_is_identical(*, shape, dtype, kind, block_size, double_quant, zeros, exponent, seed) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    weight.view(-1)[: int(weight.numel() * zeros)] = 0
    _assert_identical(weight.to(dtype), kind=kind, block_size=block_size, double_quant=double_quant)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exponents=st.lists(st.integers(-149, 116), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_any_magnitude_is_identical(exponents: list[int], seed: int) -> None:
    powers = torch.tensor(exponents, dtype=torch.float64).exp2().repeat_interleave(70)
    noise = torch.randn(powers.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = (noise * powers).float()
    for double_quant in (True, False):
        _assert_identical(weight, kind="nf4", block_size=64, double_quant=double_quant)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [64, 63, 127])
def test_weights_on_and_beside_the_cuts_are_identical(n: int, kind: Kind) -> None:
    cuts, _ = thresholds(kind)
    beside = [cuts, cuts.nextafter(torch.tensor(-2.0)), cuts.nextafter(torch.tensor(2.0)), torch.tensor([1.0])]
    for largest in (1.0, 0.3, 7e-3):
        weight = torch.cat(beside).repeat(3)[:n] * largest
        _assert_identical(weight, kind=kind, block_size=64, double_quant=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(5, 37), (64, 64), (70, 67), (1,)], ids=str)
def test_all_zeros_are_identical(shape: tuple[int, ...], double_quant: bool, dtype: torch.dtype) -> None:
    for kind in ("nf4", "fp4"):
        _assert_identical(torch.zeros(shape, dtype=dtype), kind=kind, block_size=64, double_quant=double_quant)


def test_scale_codes_near_midpoints_are_identical() -> None:
    # Blocks of one magnitude each, so that the scales are what is drawn: 200,000 of them.
    scales = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) + 0.01
    weight = scales.repeat_interleave(32)
    _assert_identical(weight, kind="nf4", block_size=32, double_quant=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_more_than_2_1_million_weights_is_identical(dtype: torch.dtype) -> None:
    weight = torch.randn(1483, 1517, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    _assert_identical(weight, kind="nf4", block_size=64, double_quant=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 256), (33, 128), (128, 64)], ids=str)
def test_ordinary_shapes_dequantize_identically_on_the_peers_own_fast_path(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs = bitsandbytes.functional.dequantize_4bit(codes, state)
    for path in cpu.paths():
        with _forced(path):
            assert torch.equal(dequantize(quantize(weight), dtype), theirs), path
