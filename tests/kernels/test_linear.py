"""The LoRA linear layer: values, gradients, and what it keeps and recomputes."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kernels import QuantizedTensor, dequantize, linear, lora_linear, quantize

OUT, IN, RANK, TOKENS = 24, 40, 3, 7


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _inputs(dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [TOKENS, IN], A, B and a bias."""
    x = _normal(TOKENS, IN, seed=1, dtype=dtype).requires_grad_()
    lora_a = _normal(RANK, IN, seed=2, dtype=adapter_dtype).requires_grad_()
    lora_b = _normal(OUT, RANK, seed=3, dtype=adapter_dtype).requires_grad_()
    return x, lora_a, lora_b, _normal(OUT, seed=4, dtype=dtype)


def _base(kind: str) -> Tensor | QuantizedTensor:
    weight = _normal(OUT, IN, seed=5)
    return weight if kind == "dense" else quantize(weight)


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    bits = torch.empty(x.shape, dtype=torch.int32).random_(generator=torch.Generator().manual_seed(seed))
    return (bits / 2**31 < 1 - dropout).double() / (1 - dropout)


@pytest.mark.parametrize("base", ["quantized", "dense"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_output_and_gradients_equal_plain_autograd_in_float64(
    dtype: torch.dtype, tolerance: float, dropout: float, base: str
) -> None:
    weight = _base(base)
    adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, lora_a, lora_b, bias = _inputs(dtype, adapter_dtype)
    dy = _normal(TOKENS, OUT, seed=6, dtype=dtype)
    y = lora_linear(x, weight, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=1.5, dropout=dropout, seed=11)
    y.backward(dy)

    dense = (dequantize(weight, dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)).double()
    x64, a64, b64 = (part.detach().double().requires_grad_() for part in (x, lora_a, lora_b))
    y64 = x64 @ dense.T + bias.double() + 1.5 * (x64 * _mask(x, dropout, 11)) @ a64.T @ b64.T
    y64.backward(dy.double())

    for found, wanted in ((y, y64), (x.grad, x64.grad), (lora_a.grad, a64.grad), (lora_b.grad, b64.grad)):
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("base", ["quantized", "dense"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_pass_a_numerical_check(dropout: float, base: str) -> None:
    weight = _base(base)
    x, lora_a, lora_b, bias = _inputs(torch.float64, torch.float64)

    def layer(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return lora_linear(x, weight, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=0.7, dropout=dropout, seed=5)

    assert torch.autograd.gradcheck(layer, (x, lora_a, lora_b))


def test_gradients_come_back_in_the_dtype_of_what_they_are_for() -> None:
    x, lora_a, lora_b, bias = _inputs(torch.bfloat16, torch.float32)
    y = lora_linear(x, _base("quantized"), bias=bias, lora_a=lora_a, lora_b=lora_b)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (lora_a.grad.dtype, lora_b.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("shape", [(IN,), (2, 3, IN), (2, 0, IN)], ids=str)
def test_any_leading_shape_is_a_list_of_rows(shape: tuple[int, ...]) -> None:
    _, lora_a, lora_b, _ = _inputs(torch.float32, torch.float32)
    x = _normal(*shape, seed=7).requires_grad_()
    y = lora_linear(x, _base("quantized"), lora_a=lora_a, lora_b=lora_b)
    rows = lora_linear(x.detach().reshape(-1, IN), _base("quantized"), lora_a=lora_a, lora_b=lora_b)
    assert torch.equal(y, rows.view(*shape[:-1], OUT))
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_a_strided_input_gives_the_result_of_its_contiguous_copy() -> None:
    _, lora_a, lora_b, _ = _inputs(torch.float32, torch.float32)
    grads = []
    for copy in (lambda t: t, torch.Tensor.contiguous):
        x = copy(_normal(5, IN, 3, seed=8).mT).detach().requires_grad_()
        lora_linear(x, _base("quantized"), lora_a=lora_a, lora_b=lora_b).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def _count_calls(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """One weak reference per dense weight made."""
    made: list[weakref.ref[Tensor]] = []

    def counted(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        dense = dequantize(q, dtype)
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(linear, "dequantize", counted)
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_weight_is_dequantized_once_forward_and_once_backward_and_never_kept(
    monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    made = _count_calls(monkeypatch)
    x, lora_a, lora_b, bias = _inputs(torch.float32, torch.float32)
    weight = _base("quantized")
    y = lora_linear(x, weight, bias=bias, lora_a=lora_a, lora_b=lora_b, dropout=dropout, seed=1)
    assert len(made) == 1
    assert made[0]() is None
    y.sum().backward()
    assert len(made) == 2
    assert made[1]() is None


def test_the_first_layer_does_not_dequantize_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _count_calls(monkeypatch)
    x, lora_a, lora_b, _ = _inputs(torch.float32, torch.float32)
    lora_linear(x.detach(), _base("quantized"), lora_a=lora_a, lora_b=lora_b).sum().backward()
    assert len(made) == 1
    assert lora_a.grad is not None
    assert lora_b.grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_the_input_its_projection_and_the_adapter_are_saved(dropout: float) -> None:
    x, lora_a, lora_b, bias = _inputs(torch.float32, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, _base("quantized"), bias=bias, lora_a=lora_a, lora_b=lora_b, dropout=dropout, seed=1)
    assert sorted(tuple(t.shape) for t in saved) == sorted([(TOKENS, IN), (TOKENS, RANK), (RANK, IN), (OUT, RANK)])
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_nothing_is_saved_for_a_layer_without_an_adapter() -> None:
    x, _, _, bias = _inputs(torch.float32, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, _base("quantized"), bias=bias)
    assert saved == []
    y.sum().backward()
    torch.testing.assert_close(x.grad, dequantize(_base("quantized"), torch.float32).sum(dim=0).expand(TOKENS, IN))


class _Products(TorchDispatchMode):
    """The result shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.shapes.append(tuple(result.shape))
        return result


def test_no_product_has_the_shape_of_the_weights_gradient() -> None:
    x, lora_a, lora_b, bias = _inputs(torch.float32, torch.float32)
    with _Products() as products:
        lora_linear(x, _base("quantized"), bias=bias, lora_a=lora_a, lora_b=lora_b).sum().backward()
    assert (TOKENS, IN) in products.shapes
    assert not {(OUT, IN), (IN, OUT)} & set(products.shapes)


def test_a_fresh_adapter_with_zero_b_leaves_the_base_output_untouched_under_dropout() -> None:
    x, lora_a, _, bias = _inputs(torch.float32, torch.float32)
    base = lora_linear(x, _base("quantized"), bias=bias)
    zero = torch.zeros(OUT, RANK)
    adapted = lora_linear(x, _base("quantized"), bias=bias, lora_a=lora_a, lora_b=zero, dropout=0.5, seed=3)
    assert torch.equal(base, adapted)


def test_the_seed_alone_decides_the_dropout_mask() -> None:
    x, lora_a, lora_b, _ = _inputs(torch.float32, torch.float32)

    def output(seed: int) -> Tensor:
        return lora_linear(x, _base("quantized"), lora_a=lora_a, lora_b=lora_b, dropout=0.3, seed=seed)

    first = output(1)
    torch.manual_seed(99)
    assert torch.equal(first, output(1))
    assert not torch.equal(first, output(2))


def test_the_global_random_state_is_left_alone() -> None:
    x, lora_a, lora_b, _ = _inputs(torch.float32, torch.float32)
    before = torch.get_rng_state()
    lora_linear(x, _base("quantized"), lora_a=lora_a, lora_b=lora_b, dropout=0.3, seed=1).sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_without_gradients_the_result_is_the_same_and_detached() -> None:
    x, lora_a, lora_b, bias = _inputs(torch.float32, torch.float32)
    with_graph = lora_linear(x, _base("quantized"), bias=bias, lora_a=lora_a, lora_b=lora_b)
    with torch.no_grad():
        without = lora_linear(x, _base("quantized"), bias=bias, lora_a=lora_a, lora_b=lora_b)
    assert not without.requires_grad
    assert torch.equal(with_graph, without)


def test_only_what_requires_a_gradient_gets_one() -> None:
    x, lora_a, lora_b, _ = _inputs(torch.float32, torch.float32)
    lora_linear(x, _base("quantized"), lora_a=lora_a.detach(), lora_b=lora_b).sum().backward()
    assert lora_a.grad is None
    assert lora_b.grad is not None
    assert x.grad is not None


_A, _B = torch.zeros(RANK, IN), torch.zeros(OUT, RANK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_a": _A}, "an adapter is a pair"),
        ({"lora_b": _B}, "an adapter is a pair"),
        ({"lora_a": _A[:, 1:], "lora_b": _B}, r"\[rank, 40\] and \[24, rank\]"),
        ({"lora_a": _A[1:], "lora_b": _B}, r"\[rank, 40\] and \[24, rank\]"),
        ({"dropout": 1.0, "seed": 1}, "below 1"),
        ({"dropout": -0.1, "seed": 1}, "at least 0"),
        ({"dropout": 0.1}, "needs a seed"),
        ({"bias": torch.zeros(OUT, requires_grad=True)}, "frozen"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_linear(torch.zeros(2, IN), _base("quantized"), **arguments)


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 39\] does not fit a weight of shape \[24, 40\]"):
        lora_linear(torch.zeros(2, IN - 1), _base("quantized"))


def test_a_dense_base_that_requires_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(torch.zeros(2, IN), torch.zeros(OUT, IN, requires_grad=True))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_far_below_the_base_is_not_rounded_away(dtype: torch.dtype, bias: bool) -> None:
    x, base = _normal(4096, IN, seed=1, dtype=dtype).requires_grad_(), _normal(OUT, IN, seed=5, dtype=dtype)
    lora_a = _normal(RANK, IN, seed=2).requires_grad_()
    # A thousandth of what it is added to, where bfloat16 has eight bits.
    lora_b = (_normal(OUT, RANK, seed=3) * 5e-4).requires_grad_()
    offset = _normal(OUT, seed=4, dtype=dtype) * 0.01 if bias else None
    y = lora_linear(x, base, bias=offset, lora_a=lora_a, lora_b=lora_b)
    dy = _normal(4096, OUT, seed=6, dtype=dtype)
    y.backward(dy)

    x64, base64, a64, b64, dy64 = (part.detach().double() for part in (x, base, lora_a, lora_b, dy))
    alone, wanted = x64 @ base64.T + (0 if offset is None else offset.double()), x64 @ a64.T @ b64.T
    dx_alone, dx_wanted = dy64 @ base64, dy64 @ b64 @ a64
    assert x.grad is not None
    for found, plain, added in ((y, alone, wanted), (x.grad, dx_alone, dx_wanted)):
        # How much of it there is: 0.7 where it is added to what is already rounded.
        share = ((found.double() - plain) * added).sum() / added.square().sum()
        assert 0.9 < share < 1.1


def test_a_caller_may_change_the_output_in_place() -> None:
    x, lora_a, lora_b, _ = _inputs(torch.float64, torch.float64)
    weight = _normal(OUT, IN, seed=5, dtype=torch.float64)
    one, two = linear.lora_linears(x[None], [linear.Layer(weight, None, lora_a, lora_b)] * 2)
    one *= 3
    two += 1
    (one.sum() + two.sum()).backward()
    found = lora_b.grad
    lora_b.grad = None
    plain = x @ weight.T + x @ lora_a.T @ lora_b.T
    (4 * plain.sum()).backward()
    assert found is not None
    torch.testing.assert_close(found, lora_b.grad, rtol=1e-12, atol=1e-12)
