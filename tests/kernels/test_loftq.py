"""LoftQ against an exact decomposition in float64, and at the edges where naive code divides by zero."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qlora_kernels import dequantize_reference, loftq_quantize, low_rank, quantize, starting_pair
from qlora_kernels.loftq import squared_norm
from qlora_kernels.quantized import QuantizedTensor

# With more than 512 rows and columns a matrix is decomposed within a subspace, otherwise exactly.
SHAPES = [(1, 1), (1, 70), (70, 1), (33, 172), (173, 66), (513, 641)]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def drawn(*shape: int, seed: int = 0, size: float = 0.02) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def left_by_rounding(*shape: int, seed: int = 0) -> Tensor:
    """What NF4 leaves of a random weight: singular values that hardly fall, the hardest case for a subspace."""
    weight = drawn(*shape, seed=seed)
    return weight - dequantize_reference(quantize(weight), torch.float32)


def exact_pair(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("shape", [(1, 70), (70, 1), (33, 172), (173, 66), (129, 511)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_small_matrix_is_decomposed_exactly(shape: tuple[int, int], rank: int) -> None:
    matrix = left_by_rounding(*shape)
    a, b = low_rank(matrix, rank=rank)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((rank, shape[1]), (shape[0], rank), torch.float32, torch.float32)
    wanted = exact_pair(matrix, rank)
    assert (b.double() @ a.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("shape", [(700, 700), (1500, 513)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 16, 32])
def test_in_a_large_matrix_nearly_the_best_of_its_rank_is_found(shape: tuple[int, int], rank: int) -> None:
    matrix = left_by_rounding(*shape)
    a, b = low_rank(matrix, rank=rank)
    best = squared_norm(exact_pair(matrix, rank))
    found = squared_norm(matrix) - squared_norm(matrix.double() - b.double() @ a.double())
    assert 0.99 * best < found <= best * (1 + 1e-6)


def test_a_large_matrix_of_low_rank_is_found_whole() -> None:
    matrix = drawn(900, 5) @ drawn(5, 600, seed=1)
    a, b = low_rank(matrix, rank=16)
    assert (b @ a - matrix).norm() <= 1e-5 * matrix.norm()
    assert int(b.any(dim=0).sum()) == 5, "what is left beyond rank 5 is rounding"


def test_both_sides_carry_the_same_share_and_their_signs_are_fixed() -> None:
    matrix = left_by_rounding(90, 130)
    a, b = low_rank(matrix, rank=7)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    assert (a.norm(dim=1).diff() <= 0).all()
    assert (a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all()
    turned = low_rank(-matrix, rank=7)
    torch.testing.assert_close(turned[0], a)
    torch.testing.assert_close(turned[1], -b)


@pytest.mark.parametrize("shape", [(520, 641), (641, 520), (66, 173)], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(shape: tuple[int, int]) -> None:
    weight, found = drawn(*shape), []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        pair = low_rank(left_by_rounding(*shape), rank=5)
        found.append((*pair, loftq_quantize(weight, rank=5, iterations=3)))
        assert torch.get_num_threads() == threads
    for a, b, q in found[1:]:
        assert torch.equal(a, found[0][0])
        assert torch.equal(b, found[0][1])
        assert same(q, found[0][2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_left_gives_zeros_to_add_and_something_to_train(shape: tuple[int, int]) -> None:
    a, b = low_rank(torch.zeros(shape), rank=3)
    assert not a.any()
    assert not b.any()
    a, b = starting_pair(torch.zeros(shape), rank=3)
    assert not b.any()
    assert (a.norm(dim=1) > 0).all()
    assert a.abs().max() <= shape[1] ** -0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 90])
def test_a_rank_beyond_the_matrix_adds_only_directions_without_weight(shape: tuple[int, int], rank: int) -> None:
    matrix = drawn(*shape)
    (a, b), plain = starting_pair(matrix, rank=rank), low_rank(matrix, rank=rank)
    found = min(rank, *shape)
    assert b[:, :found].any(dim=0).all()
    assert not b[:, found:].any()
    assert (a.norm(dim=1) > 0).all(), "a row of zeros beside a column of zeros would never be trained"
    assert torch.equal(b @ a, plain[1] @ plain[0])
    if rank >= min(shape):
        assert (b @ a - matrix).norm() <= 1e-5 * matrix.norm()


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e20, 1e37])
def test_matrices_of_any_size_are_decomposed(size: float) -> None:
    matrix = drawn(60, 80, size=1.0) * size
    a, b = low_rank(matrix, rank=60)
    assert (b.double() @ a.double() - matrix.double()).norm() <= 1e-5 * matrix.double().norm()


def test_what_float32_cannot_divide_by_counts_as_nothing() -> None:
    a, b = low_rank(torch.full((4, 5), 1e-44), rank=2)
    assert not a.any()
    assert not b.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_iteration_is_the_ordinary_store(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    weight = drawn(*shape).to(dtype)
    plain = quantize(weight, kind="fp4", block_size=32, double_quant=double_quant)
    ours = loftq_quantize(weight, kind="fp4", block_size=32, double_quant=double_quant, rank=4, iterations=1)
    assert same(ours, plain)


def distance(weight: Tensor, q: QuantizedTensor, rank: int) -> float:
    residual = weight.float() - dequantize_reference(q, torch.float32)
    a, b = low_rank(residual, rank=rank)
    return squared_norm(residual - b @ a) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "rank"), [((66, 173), 4), ((250, 300), 16), ((70, 3), 2)], ids=str)
def test_more_iterations_never_end_farther_from_the_weight(
    shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> None:
    weight = drawn(*shape).to(dtype)
    plain = quantize(weight)
    alone = squared_norm(weight.float() - dequantize_reference(plain, torch.float32)) ** 0.5
    found = [distance(weight, loftq_quantize(weight, rank=rank, iterations=n), rank) for n in (1, 2, 3, 6)]
    assert found[0] < alone, "the pair must take something from the error"
    assert found == sorted(found, reverse=True)


def test_a_pair_that_makes_up_for_everything_leaves_the_store_as_it_is() -> None:
    for shape, rank in (((1, 70), 1), ((70, 3), 3), ((66, 173), 90)):
        assert same(loftq_quantize(drawn(*shape), rank=rank, iterations=5), quantize(drawn(*shape)))


def test_iterations_come_closer_on_a_weight_much_larger_than_the_pair() -> None:
    weight = drawn(320, 256)
    first, fifth = (distance(weight, loftq_quantize(weight, rank=16, iterations=n), 16) for n in (1, 5))
    assert fifth < 0.95 * first


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("iterations", [1, 4])
def test_blocks_of_zeros_stay_finite(double_quant: bool, iterations: int) -> None:
    weight = drawn(48, 128)
    weight[5:20] = 0
    for w in (weight, torch.zeros(48, 128), torch.zeros(3, 5)):
        q = loftq_quantize(w, double_quant=double_quant, rank=4, iterations=iterations)
        dense = dequantize_reference(q, torch.float32)
        a, b = starting_pair(w - dense, rank=4)
        assert all(part.isfinite().all() for part in (dense, a, b))
        if not w.any():
            assert not dense.any()
            assert not b.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    matrix = drawn(7, 9)
    matrix[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        low_rank(matrix, rank=2)
    with pytest.raises(ValueError, match="NaN or infinity"):
        loftq_quantize(matrix, rank=2, iterations=2)


@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (0, 4), (4, 0)], ids=str)
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="it must be a matrix"):
        low_rank(torch.ones(shape), rank=2)
    with pytest.raises(ValueError, match="it must be a matrix"):
        loftq_quantize(torch.ones(shape), rank=2, iterations=2)


def test_a_rank_or_a_number_of_iterations_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="the rank must be at least 1"):
        low_rank(torch.ones(4, 4), rank=0)
    with pytest.raises(ValueError, match="the rank must be at least 1"):
        loftq_quantize(torch.ones(4, 4), rank=0, iterations=2)
    with pytest.raises(ValueError, match="cannot do 0 iterations"):
        loftq_quantize(torch.ones(4, 4), rank=1, iterations=0)
