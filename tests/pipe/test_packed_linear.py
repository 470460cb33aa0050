"""Linear layers multiply one position with the packed weight, where no gradient is wanted."""

import pytest
import torch
from torch import Tensor, nn

from qlora_kernels import cpu, dequantize, linear, quantize
from qlora_pipe.nn.linear import LoraLinear, QuantizedLinear

OUT, IN, RANK = 24, 96, 3

pytestmark = pytest.mark.skipif(cpu.path() == "torch", reason="the C kernels are not built")


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = QuantizedLinear(quantize(torch.randn(OUT, IN)))
    biased = QuantizedLinear(quantize(torch.randn(OUT, IN)), bias=torch.randn(OUT))
    adapted = LoraLinear(biased, rank=RANK, scale=1.5, dropout=0.5)
    nn.init.normal_(adapted.lora_a)
    nn.init.normal_(adapted.lora_b)
    return {"plain": plain.eval(), "biased": biased.eval(), "adapted": adapted.eval()}


@pytest.fixture
def made_dense(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Each weight that is made dense."""
    found: list[object] = []
    monkeypatch.setattr(linear, "dequantize", lambda q, dtype: found.append(q) or dequantize(q, dtype))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("kind", _layers())
def test_one_position_gives_the_layers_product_and_makes_nothing_dense(
    kind: str, dtype: torch.dtype, tolerance: float, made_dense: list[object]
) -> None:
    layer, x = _layers()[kind], _x(3, 1, IN, dtype=dtype)
    wanted = layer(x)
    assert len(made_dense) == 1
    with torch.inference_mode():
        found = layer(x)
    assert len(made_dense) == 1
    assert (found.dtype, found.shape) == (dtype, (3, 1, OUT))
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("shape", [(1, 2, IN), (17, 1, IN), (2, IN), (IN,)], ids=str)
@pytest.mark.parametrize("kind", _layers())
def test_several_positions_or_too_many_rows_keep_the_bits_of_a_dense_weight(
    kind: str, shape: tuple[int, ...], made_dense: list[object]
) -> None:
    layer, x = _layers()[kind], _x(*shape)
    with torch.no_grad():
        without = layer(x)
    assert torch.equal(without, layer(x))
    assert len(made_dense) == 2


def test_a_gradient_takes_a_dense_weight_each_way(made_dense: list[object]) -> None:
    x = _x(1, 1, IN).requires_grad_()
    _layers()["adapted"](x).sum().backward()
    assert x.grad is not None
    assert len(made_dense) == 2


def test_training_makes_the_weight_dense_whatever_the_length(made_dense: list[object]) -> None:
    layer = _layers()["plain"].train()
    with torch.no_grad():
        layer(_x(1, 1, IN))
    assert len(made_dense) == 1


def test_dropout_is_not_lost_without_gradients(made_dense: list[object]) -> None:
    layer = _layers()["adapted"].train()
    with torch.no_grad():
        assert not torch.equal(layer(_x(1, 1, IN)), layer(_x(1, 1, IN)))
    assert len(made_dense) == 2
