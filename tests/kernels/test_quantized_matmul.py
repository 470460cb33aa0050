"""Products of a few rows with 4-bit weights on a CPU, by every path, against float64."""

import math
import mmap
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_kernels import QuantizedTensor, dequantize_reference, quantize, quantized_matmul, serves
from qlora_kernels.levels import levels_of
from tests.kernels.paths import DTYPES, PATHS, bits, forced, walled

LANES = 16


@pytest.fixture(params=[*PATHS, "torch"])
def path(request: pytest.FixtureRequest):
    with forced(request.param):
        yield request.param


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
    codes = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    levels = levels_of(kind)
    if nested_block_size is None:
        scales = torch.randn(blocks, generator=generator)
        return QuantizedTensor(codes, scales, levels, None, None, None, block_size, 256, (rows, length))
    return QuantizedTensor(
        codes,
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
        levels,
        torch.rand(math.ceil(blocks / nested_block_size), generator=generator),
        torch.randn(256, generator=generator),
        torch.rand((), generator=generator),
        block_size,
        nested_block_size,
        (rows, length),
    )


def _x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _assert_close_to_float64(y: Tensor, x: Tensor, q: QuantizedTensor, *, additions: int) -> None:
    """y is within the error that so many roundings in a row make, and one to its dtype."""
    weight = dequantize_reference(q, torch.float32).double()
    wanted, sizes = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    half_ulp = torch.finfo(torch.float32).eps / 2
    bound = 1.01 * additions * half_ulp * sizes
    bound += (wanted.abs() + bound) * torch.finfo(y.dtype).eps / 2 + torch.finfo(y.dtype).smallest_normal
    assert y.shape == wanted.shape
    excess = ((y.double() - wanted).abs() - bound).max()
    assert excess <= 0, f"{excess} beyond the bound"


def _check(x: Tensor, weights: Sequence[QuantizedTensor], path: str) -> None:
    outs = [torch.full((*x.shape[:-1], q.shape[0]), math.nan, dtype=x.dtype) for q in weights]
    found = quantized_matmul(x, weights, outs=outs)
    assert all(a is b for a, b in zip(found, outs, strict=True))
    length = x.shape[-1]
    # In LANES running sums, which are then added by halves; a product may be rounded before it is added.
    additions = length + 1 if path == "torch" else math.ceil(length / LANES) + 1 + int(math.log2(LANES)) + 1
    for y, q in zip(outs, weights, strict=True):
        _assert_close_to_float64(y, x, q, additions=additions)
    again = quantized_matmul(x, weights)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(again, outs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, 17))
def test_any_number_of_rows_is_multiplied(path: str, rows: int, dtype: torch.dtype) -> None:
    _check(_x(rows, 192, dtype=dtype), [_random(7, 192)], path)


@pytest.mark.parametrize("nested_block_size", [None, 256, 3], ids="nested={}".format)
@pytest.mark.parametrize(
    ("length", "block_size"),
    [(1, 64), (31, 32), (33, 32), (64, 64), (96, 64), (160, 4096), (257, 64), (300, 34), (64, 2), (4160, 64)],
)
def test_blocks_may_run_across_rows(path: str, length: int, block_size: int, nested_block_size: int | None) -> None:
    for rows in (1, 3, 6):
        q = _random(rows, length, block_size=block_size, nested_block_size=nested_block_size)
        _check(_x(2, length), [q], path)


def test_a_row_of_more_blocks_than_are_looked_at_at_once_is_multiplied(path: str) -> None:
    _check(_x(1, 32 * 4097), [_random(2, 32 * 4097, block_size=32)], path)


@settings(max_examples=80, deadline=None, database=None)
@given(
    path=st.sampled_from([*PATHS, "torch"]),
    leading=st.lists(st.integers(1, 4), max_size=2),
    length=st.one_of(st.integers(1, 300), st.integers(1, 12).map(lambda chunks: 32 * chunks)),
    heights=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    block_size=st.sampled_from([32, 64, 96, 34, 4096]),
    nested_block_size=st.sampled_from([None, 256, 5]),
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_of_any_size_and_form_share_their_input(
    *, path, leading, length, heights, block_size, nested_block_size, kind, dtype, seed
) -> None:
    settings = {"block_size": block_size, "nested_block_size": nested_block_size, "kind": kind}
    weights = [_random(rows, length, seed=seed + rows, **settings) for rows in heights]
    # One of another form among them.
    weights.append(_random(3, length, block_size=128, nested_block_size=None, seed=seed))
    with forced(path):
        _check(_x(*leading, length, dtype=dtype, seed=seed), weights, path)


def test_the_vector_paths_give_the_same_bits_for_any_number_of_rows() -> None:
    vector_paths = [path for path in PATHS if path != "portable"]
    if not vector_paths:
        pytest.skip("this processor has none, or the C kernels are not built")
    x, q = _x(16, 1056), _random(11, 1056)
    found = []
    for path in vector_paths:
        with forced(path):
            found += [quantized_matmul(x, [q])[0]]
            found += [
                torch.cat([quantized_matmul(x[i : i + n], [q])[0] for i in range(0, 16, n)]) for n in (1, 2, 3, 5)
            ]
    assert all(torch.equal(bits(y), bits(found[0])) for y in found)


@pytest.mark.skipif(not PATHS, reason="the C kernels are not built")
@pytest.mark.parametrize("length", [1024, 1001])
def test_any_number_of_threads_gives_the_same_bits(path: str, length: int) -> None:
    if path == "torch":
        pytest.skip("torch adds in an order that depends on the number of threads")
    x, weights = _x(3, length), [_random(rows, length, seed=rows) for rows in (1501, 3, 700)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(quantized_matmul(x, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bits(a), bits(b)) for ys in found for a, b in zip(ys, found[0], strict=True))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_weights_may_be_read_only_mappings_at_odd_addresses(path: str, tmp_path) -> None:
    q = _random(9, 128)
    x = _x(2, 128)
    wanted = quantized_matmul(x, [q])[0]
    data = b"".join(b"\0" + bits(part).numpy().tobytes() for part in q[:6])
    file = tmp_path / "weights"
    file.write_bytes(data)
    with file.open("rb") as opened:
        mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    parts, at = [], 0
    for part in q[:6]:
        at += 1
        view = torch.frombuffer(mapping, dtype=part.dtype, count=part.numel(), offset=at)
        parts.append(view.view(part.shape))
        at += part.nbytes
    assert torch.equal(quantized_matmul(x, [QuantizedTensor(*parts, *q[6:])])[0], wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 63, 64, 96])
def test_nothing_is_touched_beyond_the_ends(path: str, length: int, dtype: torch.dtype) -> None:
    q, x = _random(5, length), _x(3, length, dtype=dtype)
    wanted = quantized_matmul(x, [q])[0]
    parts = [walled(part.numel(), part.dtype).copy_(part.view(-1)) for part in q[:6]]
    behind = QuantizedTensor(*parts[:5], parts[5][0], *q[6:])
    out = walled(wanted.numel(), dtype).view(wanted.shape)
    quantized_matmul(walled(x.numel(), dtype).copy_(x.view(-1)).view(x.shape), [behind], outs=[out])
    assert torch.equal(bits(out), bits(wanted))
    # And nothing before the start, seen from the middle of a larger tensor.
    large = torch.full((wanted.numel() + 64,), math.nan, dtype=dtype)
    quantized_matmul(x, [q], outs=[large[32:-32].view(wanted.shape)])
    assert large[:32].isnan().all()
    assert large[-32:].isnan().all()
    assert torch.equal(large[32:-32], wanted.view(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite_come_out_as_such(path: str, dtype: torch.dtype) -> None:
    q = quantize(torch.full((3, 64), 0.5))
    x = torch.ones(4, 64, dtype=dtype)
    x[0, 5], x[1, 6], x[2, 7] = math.nan, math.inf, -math.inf
    # A NaN whose bits are all ones must not be rounded to a number.
    x[3, 8:9] = torch.full((dtype.itemsize,), 0xFF, dtype=torch.uint8).view(dtype)
    y = quantized_matmul(x, [q])[0]
    assert y[0].isnan().all()
    assert (y[1] == math.inf).all()
    assert (y[2] == -math.inf).all()
    assert y[3].isnan().all()


def test_a_caller_that_flushes_subnormal_numbers_gets_the_same_bits(path: str) -> None:
    if path == "torch":
        pytest.skip("plain torch flushes them as its caller asks")
    q, x = _random(5, 64, nested_block_size=None), _x(2, 64) * 1e-38
    half = torch.full((2, 64), 6e-8, dtype=torch.float16)
    wanted = [quantized_matmul(each, [q])[0] for each in (x, half)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        found = [quantized_matmul(each, [q])[0] for each in (x, half)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, wanted, strict=True))
    assert (wanted[0] != 0).any()


def test_x_need_not_be_contiguous_and_may_have_any_leading_sizes(path: str) -> None:
    q = _random(5, 96)
    wide = _x(2, 3, 192)
    x = wide[..., ::2]
    wanted = quantized_matmul(x.contiguous(), [q])[0]
    assert wanted.shape == (2, 3, 5)
    assert torch.equal(quantized_matmul(x, [q])[0], wanted)
    assert torch.equal(quantized_matmul(x[1, 2], [q])[0], quantized_matmul(x[1:2, 2], [q])[0][0])
    assert quantized_matmul(x[:0], [q])[0].shape == (0, 3, 5)


def _faults() -> dict[str, tuple[str, Callable[[], object]]]:
    q = _random(5, 64)
    x = _x(3, 64)
    return {
        "gradient": ("no gradient", lambda: quantized_matmul(_x(3, 64).requires_grad_(), [q])),
        "dtype": ("float64", lambda: quantized_matmul(x.double(), [q])),
        "length": (r"\[3, 63\]", lambda: quantized_matmul(x[:, :63], [q])),
        "rows": ("65 rows", lambda: quantized_matmul(_x(5, 13, 64), [q])),
        "no matrix": (r"\[320\]", lambda: quantized_matmul(x, [q._replace(shape=(320,))])),
        "number of outs": ("outs", lambda: quantized_matmul(x, [q], outs=[])),
        "shape of outs": ("outs", lambda: quantized_matmul(x, [q], outs=[torch.empty(5, 3)])),
        "dtype of outs": ("outs", lambda: quantized_matmul(x, [q], outs=[torch.empty(3, 5).half()])),
        "layout of outs": ("contiguous", lambda: quantized_matmul(x, [q], outs=[torch.empty(5, 3).T])),
    }


@pytest.mark.parametrize("fault", _faults())
def test_what_does_not_fit_is_refused(fault: str) -> None:
    message, call = _faults()[fault]
    with pytest.raises(ValueError, match=message):
        call()


def test_it_serves_few_rows_that_want_no_gradient(path: str) -> None:
    q = _random(5, 64)
    assert serves(_x(8, 64), [q]) == (path != "torch")
    assert serves(_x(2, 8, 64), [q]) == (path != "torch")
    assert not serves(_x(17, 64), [q])
    assert not serves(_x(9, 64, dtype=torch.bfloat16), [q])
    assert not serves(_x(1, 64, dtype=torch.float64), [q])
    wanting = _x(1, 64).requires_grad_()
    assert not serves(wanting, [q])
    with torch.no_grad():
        assert serves(wanting, [q]) == (path != "torch")
        quantized_matmul(wanting, [q])


def test_more_rows_than_it_serves_are_multiplied_all_the_same(path: str) -> None:
    _check(_x(64, 96), [_random(5, 96)], "torch")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph is captured on a GPU")
@pytest.mark.parametrize("rows", [1, 8])
def test_a_graph_replays_it_without_an_allocation(rows: int) -> None:
    weights = [
        QuantizedTensor(*(part.cuda() for part in _random(256, 512, seed=seed)[:6]), 64, 256, (256, 512))
        for seed in range(3)
    ]
    x = torch.zeros(rows, 512, dtype=torch.float16, device="cuda")
    outs = [torch.empty(rows, 256, dtype=torch.float16, device="cuda") for _ in weights]
    quantized_matmul(x, weights, outs=outs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    quantized_matmul(x, weights, outs=outs)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantized_matmul(x, weights, outs=outs)
    x.copy_(_x(rows, 512))
    for out in outs:
        out.fill_(math.nan)
    graph.replay()
    for out, again in zip(outs, quantized_matmul(x, weights), strict=True):
        assert torch.equal(out, again)
