"""Causal attention with windows, caps and scales of its own, against the formula pair by pair in float64."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kernels.rotary import rotate
from qlora_pipe.nn import ruled_attention
from qlora_pipe.nn.attention import PLAIN, Scores, causal_attention, flash_packed
from qlora_pipe.nn.cache import KVCache, StepCache
from qlora_pipe.nn.packing import Packing
from qlora_pipe.nn.ruled_attention import Rule, flex_ruled

HEADS, KV_HEADS, SIZE = 6, 2, 5
LENGTHS = pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (1, 9), (5, 33), (71, 71)], ids=str)
WINDOWS = pytest.mark.parametrize("window", [None, 1, 3, 33, 71, 200])
CAPS = pytest.mark.parametrize("softcap", [None, 1.5])
ROWS = ((5, 11, 2), (17,), (1, 1, 13, 3))


def inputs(queries: int, keys: int, *, rows: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draws = torch.Generator().manual_seed(queries + keys)
    shapes = ((rows, HEADS, queries, SIZE), (rows, KV_HEADS, keys, SIZE), (rows, KV_HEADS, keys, SIZE))
    return [torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_the_formula(queries: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
    """All scores at once, one pair of heads at a time."""
    n_queries, n_keys = queries.shape[2], keys.shape[2]
    away = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
    unseen = (away < 0) | (away >= (scores.window or n_keys))
    mixed = []
    for head in range(queries.shape[1]):
        shared = head // (queries.shape[1] // keys.shape[1])
        found = queries[:, head] @ keys[:, shared].mT * (scores.scale or 1 / math.sqrt(queries.shape[3]))
        if scores.softcap is not None:
            found = scores.softcap * torch.tanh(found / scores.softcap)
        mixed.append(found.masked_fill(unseen, -torch.inf).softmax(-1) @ values[:, shared])
    return torch.cat(mixed, dim=-1)


def weighted(mixed: Tensor) -> Tensor:
    """A scalar in which every element counts otherwise."""
    return mixed.mul(torch.arange(mixed.numel()).view_as(mixed).cos().to(mixed.dtype)).sum()


@LENGTHS
@WINDOWS
@CAPS
@pytest.mark.parametrize("scores_held", [1, 700, 1 << 22])
def test_values_and_gradients_are_those_of_the_formula(  # noqa: PLR0917
    monkeypatch: pytest.MonkeyPatch,
    queries: int,
    keys: int,
    window: int | None,
    softcap: float | None,
    scores_held: int,
) -> None:
    monkeypatch.setattr(ruled_attention, "_SCORES", scores_held)
    scores = Scores(window=window, softcap=softcap, scale=0.7)
    found = []
    for attend in (causal_attention, by_the_formula):
        parts = inputs(queries, keys)
        mixed = attend(*parts, scores=scores)
        weighted(mixed).backward()
        found.append([mixed, *(part.grad for part in parts)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scores", [Scores(window=3), Scores(softcap=0.8), Scores(window=4, softcap=2.0, scale=0.3)])
def test_gradients_pass_the_check_by_differences(scores: Scores) -> None:
    assert torch.autograd.gradcheck(lambda *parts: causal_attention(*parts, scores=scores), inputs(4, 7, rows=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scores", [Scores(window=9), Scores(window=9, softcap=1.5)])
def test_shorter_types_are_computed_in_float32(dtype: torch.dtype, scores: Scores) -> None:
    parts = inputs(41, 41, dtype=dtype)
    mixed = causal_attention(*parts, scores=scores)
    weighted(mixed).backward()
    exact = [part.detach().double().requires_grad_() for part in parts]
    wanted = by_the_formula(*exact, scores)
    weighted(wanted).backward()
    rounding = 4 * torch.finfo(dtype).eps
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), wanted, rtol=rounding, atol=rounding)
    for part, other in zip(parts, exact, strict=True):
        assert part.grad is not None
        assert other.grad is not None
        assert part.grad.dtype == dtype
        torch.testing.assert_close(part.grad.double(), other.grad, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (1, 9), (5, 33)], ids=str)
@pytest.mark.parametrize("scores", [PLAIN, Scores(window=33), Scores(window=10**9)], ids=["plain", "equal", "longer"])
def test_what_neither_caps_nor_leaves_out_has_the_bits_of_torchs_own_attention(
    queries: int, keys: int, scores: Scores, dtype: torch.dtype
) -> None:
    found = []
    for ours in (True, False):
        q, k, v = inputs(queries, keys, dtype=dtype)
        if ours:
            mixed = causal_attention(q, k, v, scores=scores)
        else:
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if 1 < queries < keys else None
            mixed = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and queries > 1, enable_gqa=True
            )
            mixed = mixed.transpose(1, 2).flatten(2)
        weighted(mixed).backward()
        found.append([mixed, q.grad, k.grad, v.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("scores", [Scores(softcap=2.0), Scores(window=40), Scores(window=40, softcap=2.0)])
def test_no_tensor_as_large_as_all_pairs_is_ever_made(monkeypatch: pytest.MonkeyPatch, scores: Scores) -> None:
    tokens = 600
    monkeypatch.setattr(ruled_attention, "_SCORES", 10 * HEADS * tokens)
    with Largest() as largest:
        causal_attention(*inputs(tokens, tokens), scores=scores).sum().backward()
    assert largest.elements <= max(10 * HEADS * tokens, 2 * HEADS * tokens * SIZE) < tokens * tokens / 4


def test_few_pairs_are_made_that_a_window_leaves_out() -> None:
    pieces = ruled_attention._pieces(*inputs(5000, 5000, rows=1), Rule(100, None, 1.0))
    assert 100 * 4900 < sum(piece.unseen.numel() for piece in pieces) < 2.1 * 100 * 5000


@WINDOWS
@CAPS
def test_samples_of_packed_rows_are_attended_to_alone(window: int | None, softcap: float | None) -> None:
    packing = Packing.of(ROWS, width=19)
    parts = inputs(19, 19, rows=3)
    scores = Scores(window=window, softcap=softcap)
    mixed = causal_attention(*parts, packing=packing, scores=scores)
    for row, lengths in enumerate(ROWS):
        for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
            here = (slice(row, row + 1), slice(None), slice(end - length, end))
            alone = by_the_formula(*(part[here] for part in parts), scores)
            torch.testing.assert_close(mixed[row, end - length : end], alone[0], rtol=1e-12, atol=1e-12)
        assert not mixed[row, sum(lengths) :].any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@LENGTHS
@WINDOWS
@CAPS
def test_the_kernel_for_a_gpu_is_told_the_same(
    queries: int, keys: int, window: int | None, softcap: float | None
) -> None:
    parts = [part.detach() for part in inputs(queries, keys, dtype=torch.float32)]
    found = flex_ruled(*parts, Rule(window, softcap, 0.7), compiled=False)
    wanted = by_the_formula(*parts, Scores(window, softcap, 0.7))
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_the_kernel_for_a_gpu_is_told_the_same_of_packed_rows(window: int | None) -> None:
    packing = Packing.of(ROWS, width=19)
    parts = [part.detach() for part in inputs(19, 19, rows=3, dtype=torch.float32)]
    found = flex_ruled(*parts, Rule(window, 1.5, 0.7), packing=packing, compiled=False).transpose(1, 2).flatten(2)
    wanted = causal_attention(*parts, packing=packing, scores=Scores(window, 1.5, 0.7))
    inside = torch.stack([torch.arange(19) < sum(row) for row in ROWS])
    torch.testing.assert_close(found[inside], wanted[inside], rtol=1e-5, atol=1e-5)
    assert found.isfinite().all()


def test_flash_is_told_how_many_positions_lie_before_the_querys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def varlen_attn(  # noqa: PLR0917
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        told.update(scale=scale, window_size=window_size)
        return query

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    parts = inputs(19, 19, rows=3)
    # The window of 1 is the query's own position.
    for scores, size in ((Scores(window=1, scale=0.3), (0, 0)), (Scores(window=7, scale=0.3), (6, 0))):
        flash_packed(*parts, Packing.of(ROWS, width=19), scores=scores)
        assert told == {"scale": 0.3, "window_size": size}
    flash_packed(*parts, Packing.of(ROWS, width=19))
    assert told == {"scale": None, "window_size": (-1, 0)}


def turned(positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("window", [None, 1, 4, 13, 40])
@CAPS
def test_both_caches_go_on_as_the_whole_text_would(window: int | None, softcap: float | None) -> None:
    tokens, prompt = 13, 6
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, tokens, 6, generator=draws, dtype=torch.float64) for n in (HEADS, KV_HEADS, KV_HEADS))
    scores = Scores(window=window, softcap=softcap, scale=0.4)
    cosines, sines = turned(range(tokens))
    wanted = by_the_formula(rotate(q, cosines, sines), rotate(k, cosines, sines), v, scores)

    def parts(start: int, end: int) -> list[Tensor]:
        return [part[:, :, start:end] for part in (q, k, v)]

    growing = KVCache(
        layers=1, batch=2, kv_heads=KV_HEADS, capacity=tokens, head_dim=6, dtype=torch.float64, device=q.device
    )
    tables = turned(range(prompt))
    mixed = [growing.attend(0, *parts(0, prompt), cosines=tables[0], sines=tables[1], scores=scores)]
    growing.advance(prompt)
    stepping = StepCache(growing, capacity=tokens + 3)
    steps = []
    for position in range(prompt, tokens):
        cosines, sines = turned([position])
        for cache, found in ((growing, mixed), (stepping, steps)):
            here = parts(position, position + 1)
            found.append(cache.attend(0, *here, cosines=cosines, sines=sines, scores=scores))
            cache.advance(1)
    torch.testing.assert_close(torch.cat(mixed, dim=1), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted[:, prompt:], rtol=1e-12, atol=1e-12)
