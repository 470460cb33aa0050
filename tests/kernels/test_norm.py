"""RMSNorm of rows: the bits of the plain module, and gradients against float64."""

from collections.abc import Iterator

import pytest
import torch

from qlora_kernels import add_rms_norm, cpu, rms_norm, rms_norm_reference, rows_cpu
from tests.kernels.norms import DTYPES, assert_gradient_is_exact, sample
from tests.kernels.paths import forced
from tests.kernels.rows import gradients, normal, unwritten_is_nan

EPS = 1e-5


@pytest.fixture(params=cpu.paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    rows_cpu.norms_as_torch_does.cache_clear()
    with forced(request.param), unwritten_is_nan():
        yield request.param


@pytest.mark.parametrize("width", [1, 7, 8, 33, 100, 1000, 1024, 5120])
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_the_bits_are_those_of_the_plain_module(
    path: str, unit_offset: bool, dtype: torch.dtype, rows: int, width: int
) -> None:
    x, delta, weight = sample(rows, width, dtype)
    y = rms_norm(x, weight, eps=EPS, unit_offset=unit_offset)
    assert torch.equal(y, rms_norm_reference(x, weight, eps=EPS, unit_offset=unit_offset))
    total, y = add_rms_norm(x, delta, weight, eps=EPS, unit_offset=unit_offset)
    assert torch.equal(total, x + delta)
    assert torch.equal(y, rms_norm_reference(x + delta, weight, eps=EPS, unit_offset=unit_offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_a_unit_offset_the_product_with_one_plus_the_weight_is_rounded_once(dtype: torch.dtype) -> None:
    x, _, weight = sample(7, 33, dtype)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    y = rms_norm(x, weight, eps=EPS, unit_offset=True)
    assert torch.equal(y, (wide * (1 + weight.float())).to(dtype))


@pytest.mark.skipif(cpu.paths() == ("torch",), reason="the C kernels are not built")
def test_the_c_library_serves_the_widths_of_models() -> None:
    assert all(rows_cpu.norms_as_torch_does(width) for width in (8, 64, 512, 1024, 2048, 4096, 5120, 8192, 16_384))
    assert not rows_cpu.norms_as_torch_does(16_385)


@pytest.mark.parametrize("width", [1, 7, 33, 1000])
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradients_are_those_of_float64(
    path: str, unit_offset: bool, dtype: torch.dtype, rows: int, width: int
) -> None:
    assert_gradient_is_exact(*sample(rows, width, dtype), eps=EPS, unit_offset=unit_offset)


def test_where_torch_adds_in_another_order_the_bits_are_still_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_cpu, "norms_as_torch_does", lambda width: False)
    x, _, weight = sample(7, 100, torch.bfloat16)
    for unit_offset in (False, True):
        y = rms_norm(x, weight, eps=EPS, unit_offset=unit_offset)
        assert torch.equal(y, rms_norm_reference(x, weight, eps=EPS, unit_offset=unit_offset))
        assert_gradient_is_exact(*sample(7, 100, torch.bfloat16), eps=EPS, unit_offset=unit_offset)


def test_any_layout_and_number_of_dimensions_will_do(path: str) -> None:
    x, weight = normal(5, 64, 3).transpose(1, 2), normal(64)
    assert torch.equal(rms_norm(x, weight, eps=EPS), rms_norm_reference(x.contiguous(), weight, eps=EPS))
    expanded = torch.ones(()).expand(5, 3, 64)
    flat = x.contiguous().requires_grad_()
    strided = x.detach().requires_grad_()
    found, wanted = (
        torch.autograd.grad(rms_norm(leaf, weight, eps=EPS), leaf, expanded)[0] for leaf in (strided, flat)
    )
    assert torch.equal(found, wanted)


def test_a_weight_of_another_dtype_gives_what_the_plain_module_gives(path: str) -> None:
    x, weight = normal(7, 33, dtype=torch.bfloat16), normal(33)
    y = rms_norm(x, weight, eps=EPS)
    assert y.dtype == torch.float32
    assert torch.equal(y, rms_norm_reference(x, weight, eps=EPS))
    y = rms_norm(x, weight, eps=EPS, unit_offset=True)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rms_norm_reference(x, weight, eps=EPS, unit_offset=True))


def test_no_rows_give_no_rows(path: str) -> None:
    x = torch.zeros(0, 33, requires_grad=True)
    y = rms_norm(x, normal(33), eps=EPS)
    assert y.shape == gradients([y], [x])[0].shape == (0, 33)


def test_only_x_and_its_roots_are_kept() -> None:
    kept = []
    x, delta, weight = sample(7, 33, torch.float32)
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        rms_norm(x, weight, eps=EPS)
        add_rms_norm(x, delta, weight, eps=EPS)
    assert [tuple(saved.shape) for saved in kept] == [(7, 33), (7,), (7, 33), (7,)]


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, delta, weight = sample(1025, 1024, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            outputs = add_rms_norm(leaf, delta, weight, eps=EPS)
            results.append([*outputs, *gradients(outputs, [leaf])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    x, weight = normal(7, 33), normal(33)
    with pytest.raises(ValueError, match="frozen"):
        rms_norm(x, weight.clone().requires_grad_(), eps=EPS)
    with pytest.raises(ValueError, match=r"weight of shape \[32\] does not fit x of shape \[7, 33\]"):
        rms_norm(x, weight[:-1], eps=EPS)
    with pytest.raises(ValueError, match="in one pass"):
        add_rms_norm(x, x.bfloat16(), weight, eps=EPS)
