"""The squared error of a quantized weight: one order of summation everywhere."""

import math

import pytest
import torch

from qlora_kernels import blockwise, dequantize_reference, quantize, squared_error
from tests.kernels.paths import DTYPES, PATHS, forced, normal

SIZES = [1, 15, 16, 17, 4095, 4096, 4097, 300_001]


@pytest.mark.parametrize("path", [*PATHS, "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_sum_over_all_weights(n: int, dtype: torch.dtype, path: str) -> None:
    weight = normal(n, dtype=dtype)
    q = quantize(weight)
    exact, approximate = weight.double(), dequantize_reference(q, torch.float32).double()
    with forced(path):
        error, size = squared_error(weight, q)
    assert error == pytest.approx(math.fsum((exact - approximate).square().tolist()), rel=1e-13)
    assert size == pytest.approx(math.fsum(exact.square().tolist()), rel=1e-13)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_every_path_gives_the_bits_of_the_reference(block_size: int, dtype: torch.dtype, path: str) -> None:
    for n in SIZES:
        weight = normal(n, seed=n, dtype=dtype)
        q = blockwise.quantize(weight, block_size=block_size)
        with forced(path):
            assert squared_error(weight, q) == blockwise.squared_error_reference(weight, q)


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    weight = normal(1_500_001)
    q = quantize(weight)
    before = torch.get_num_threads()
    found = set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.add(squared_error(weight, q))
    torch.set_num_threads(before)
    assert len(found) == 1


def test_a_weight_that_is_exact_in_4_bits_has_no_error() -> None:
    weight = torch.tensor([1.0, -1.0, 0.0]).repeat(50)
    assert squared_error(weight, quantize(weight, double_quant=False)) == (0.0, 100.0)


def test_a_weight_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"100 weights.*130"):
        squared_error(torch.zeros(10, 10), quantize(torch.zeros(13, 10)))
