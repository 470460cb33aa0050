"""Attention with a bias by distance, against the formula with a dense bias."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_pipe.nn import relative_bias
from qlora_pipe.nn.relative_bias import Rule, bias_by_distance, biased_attention, flex_biased, t5_bucket

HEADS, BUCKETS, FARTHEST = 3, 8, 20
LENGTHS = pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (1, 9), (5, 33), (41, 41)], ids=str)


def bucket_of(both_ways: bool) -> Callable[[Tensor], Tensor]:
    return lambda distances: t5_bucket(distances, buckets=BUCKETS, farthest=FARTHEST, both_ways=both_ways)


def inputs(queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and a table of two sequences."""
    draws = torch.Generator().manual_seed(queries + keys)
    shapes = ((2, HEADS, queries, 5), (2, HEADS, keys, 5), (2, HEADS, keys, 5), (HEADS, BUCKETS))
    return [torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_the_formula(parts: list[Tensor], *, causal: bool, scale: float, key_lengths: Tensor | None) -> Tensor:
    """The same with a dense bias [H, T, S], pair by pair as the paper says it."""
    queries, keys, values, table = parts
    n_queries, n_keys = queries.shape[2], keys.shape[2]
    places = torch.arange(n_keys)
    distance = places - places[n_keys - n_queries :, None]
    scores = queries @ keys.mT * scale + table[:, bucket_of(not causal)(distance)]
    if causal:
        scores = scores.masked_fill(distance > 0, -torch.inf)
    if key_lengths is not None:
        scores = scores.masked_fill(places >= key_lengths[:, None, None, None], -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


def ours(parts: list[Tensor], *, causal: bool, scale: float, key_lengths: Tensor | None) -> Tensor:
    queries, keys, values, table = parts
    bias = bias_by_distance(table, bucket_of(not causal), queries=queries.shape[2], keys=keys.shape[2])
    return biased_attention(queries, keys, values, bias=bias, causal=causal, scale=scale, key_lengths=key_lengths)


@LENGTHS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("scores_held", [1, 200, 1 << 22])
def test_values_and_gradients_are_those_of_a_dense_bias(  # noqa: PLR0917
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, causal: bool, short: bool, scores_held: int
) -> None:
    monkeypatch.setattr(relative_bias, "_SCORES", scores_held)
    key_lengths = torch.tensor([keys, max(1, keys // 3)]) if short else None
    found = []
    for attend in (ours, by_the_formula):
        parts = inputs(queries, keys, torch.float64)
        mixed = attend(parts, causal=causal, scale=0.7, key_lengths=key_lengths)
        mixed.mul(torch.arange(mixed.numel()).view_as(mixed).cos()).sum().backward()
        found.append([mixed, *(part.grad for part in parts)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    parts = inputs(41, 41, dtype)
    mixed = ours(parts, causal=True, scale=1.0, key_lengths=None)
    weights = torch.arange(mixed.numel()).view_as(mixed).cos().to(dtype)
    mixed.backward(weights)
    exact = [part.detach().double().requires_grad_() for part in parts]
    wanted = by_the_formula(exact, causal=True, scale=1.0, key_lengths=None)
    rounding = torch.finfo(dtype).eps
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), wanted, rtol=rounding, atol=rounding)
    wanted.backward(weights.double())
    for part, other in zip(parts, exact, strict=True):
        assert part.grad is not None
        assert other.grad is not None
        assert part.grad.dtype == dtype
        torch.testing.assert_close(part.grad.double(), other.grad, rtol=rounding, atol=rounding)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_no_tensor_as_large_as_all_pairs_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 300
    monkeypatch.setattr(relative_bias, "_SCORES", 10 * HEADS * tokens)
    parts = inputs(tokens, tokens, torch.float32)
    with Largest() as largest:
        ours(parts, causal=True, scale=1.0, key_lengths=None).sum().backward()
    assert 10 * HEADS * tokens <= largest.elements < tokens * tokens / 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@LENGTHS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("short", [False, True])
def test_the_kernel_for_a_gpu_is_told_the_same(queries: int, keys: int, causal: bool, short: bool) -> None:
    key_lengths = torch.tensor([keys, max(1, keys // 3)]) if short else None
    parts = [part.detach() for part in inputs(queries, keys, torch.float32)]
    bias = bias_by_distance(parts[3], bucket_of(not causal), queries=queries, keys=keys)
    found = flex_biased(*parts[:3], bias=bias, rule=Rule(causal, 0.7, key_lengths), compiled=False)
    wanted = by_the_formula(parts, causal=causal, scale=0.7, key_lengths=key_lengths)
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("both_ways", [False, True])
def test_the_nearest_distances_have_a_bucket_each_and_the_others_share_ever_wider_ones(both_ways: bool) -> None:
    distances = torch.arange(-200, 201)
    found = t5_bucket(distances, buckets=32, farthest=128, both_ways=both_ways).tolist()
    for distance, bucket in zip(distances.tolist(), found, strict=True):
        side = 16 if both_ways else 32
        after = side if both_ways and distance > 0 else 0
        away = abs(distance) if both_ways else max(0, -distance)
        near = side // 2
        if away >= near:
            away = min(side - 1, near + int(math.log(away / near) / math.log(128 / near) * (side - near)))
        assert bucket == after + away
