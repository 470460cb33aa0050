"""The kernels that attend from one new token, against the reference in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_kernels import decode_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def _step(
    length: int, capacity: int, *, heads: int, kv_heads: int, size: int, dtype: torch.dtype, batch: int = 1
) -> dict[str, Tensor]:
    """Arguments of one step after `length` tokens; what lies behind these is NaN. The same text for every capacity."""
    draws = torch.Generator().manual_seed(length + heads + size)
    cached = torch.full((2, batch, kv_heads, capacity, size), math.nan)
    cached[..., :length, :] = torch.randn(2, batch, kv_heads, length, size, generator=draws)
    # As one product leaves them: the heads of all three side by side in a row.
    projected = torch.randn(batch, heads + 2 * kv_heads, size, generator=draws)
    queries, keys, values = projected[:, :, None].split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.rand(size // 2, generator=draws).mul(6).repeat(2)
    step = {
        "queries": queries,
        "keys": keys,
        "values": values,
        "cached_keys": cached[0].clone(),
        "cached_values": cached[1].clone(),
        "cosines": angles.cos(),
        "sines": angles.sin(),
    }
    on_device = {name: part.to(dtype).to(DEVICE) for name, part in step.items()}
    return {**on_device, "position": torch.tensor([length], device=DEVICE)}


def _in_float64(step: dict[str, Tensor], **rule: Any) -> Tensor:
    """The reference, which alone takes float64, on a copy."""
    return decode_attention(
        **{name: part.double() if part.is_floating_point() else part for name, part in step.items()}, **rule
    )


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (6, 2, 40), (5, 1, 6)])
@pytest.mark.parametrize("length", [0, 31, 32, 77])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_gives_the_attention_over_what_is_filled(
    dtype: torch.dtype, length: int, heads: int, kv_heads: int, size: int
) -> None:
    step = _step(length, 97, heads=heads, kv_heads=kv_heads, size=size, dtype=dtype)
    expected = _in_float64(step)
    mixed = decode_attention(**step)
    assert mixed.shape == (1, 1, heads * size)
    assert mixed.dtype == dtype
    # Rounded to the type: turned queries and keys, the softmax's weights, and the result.
    bound = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(mixed.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize(("window", "softcap"), [(None, 2.5), (1, None), (33, 50.0), (64, 2.5), (78, None), (500, 2.5)])
@pytest.mark.parametrize("length", [0, 31, 77])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_sees_what_lies_in_its_window_and_caps_the_scores(
    dtype: torch.dtype, length: int, window: int | None, softcap: float | None
) -> None:
    step = _step(length, 97, heads=6, kv_heads=2, size=12, dtype=dtype)
    rule = {"window": window, "softcap": softcap, "scale": 0.6}
    expected = _in_float64(step, **rule)
    if window is not None:
        # What lies before the window may be anything.
        for name in ("cached_keys", "cached_values"):
            step[name][:, :, : max(0, length + 1 - window)] = math.nan
    bound = 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(decode_attention(**step, **rule).double(), expected, rtol=bound, atol=bound)


def test_a_window_in_which_all_lies_changes_no_bit() -> None:
    step = _step(77, 97, heads=6, kv_heads=2, size=12, dtype=torch.float32)
    plain = decode_attention(**step)
    for window in (78, 97, 10**6):
        torch.testing.assert_close(decode_attention(**step, window=window), plain, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.2, 0.3, 3.0, 40.0])
def test_capped_scores_are_as_exact_for_small_ones_as_for_large(size: float) -> None:
    # One component makes the score; the values tell the two keys' weights apart.
    step = _step(1, 4, heads=1, kv_heads=1, size=2, dtype=torch.float32)
    del step["cosines"], step["sines"]
    one = torch.tensor([1.0, 0.0], device=DEVICE)
    step["queries"], step["keys"] = (torch.full((1, 1, 1, 2), size**0.5, device=DEVICE) * one for _ in range(2))
    step["cached_keys"][0, 0, 0], step["cached_values"][0, 0, 0], step["values"][:] = 0.0, 0.0, one
    found = decode_attention(**step, softcap=50.0, scale=1.0)[0, 0, 0].item()
    # The cap multiplies what tanh loses by 50; what is left is the rounding of weights of about a half.
    assert found == pytest.approx(1 / (1 + math.exp(-50 * math.tanh(size / 50))), abs=1.5e-7)


@pytest.mark.parametrize("length", [0, 32, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_stores_the_bits_that_torch_makes_and_touches_nothing_else(dtype: torch.dtype, length: int) -> None:
    step = _step(length, 64, heads=6, kv_heads=3, size=20, dtype=dtype, batch=2)
    before = {name: step[name].clone() for name in ("cached_keys", "cached_values")}
    decode_attention(**step)
    turned = _rotated(step["keys"], step["cosines"], step["sines"])
    for name, new in (("cached_keys", turned), ("cached_values", step["values"])):
        before[name][:, :, length] = new[:, :, 0]
        torch.testing.assert_close(step[name], before[name], rtol=0, atol=0, equal_nan=True)


def test_without_tables_nothing_is_turned() -> None:
    step = _step(40, 50, heads=4, kv_heads=2, size=8, dtype=torch.float32)
    still = {**step, "cosines": torch.ones(8, device=DEVICE), "sines": torch.zeros(8, device=DEVICE)}
    del step["cosines"], step["sines"]
    copied = {name: part.clone() for name, part in still.items()}
    torch.testing.assert_close(decode_attention(**step), decode_attention(**copied), rtol=0, atol=0)


def test_neither_the_capacity_nor_the_batch_changes_a_bit() -> None:
    # More chunks than are joined at a time: 66.
    small, large = (_step(2100, room, heads=2, kv_heads=1, size=8, dtype=torch.float32) for room in (2101, 2200))
    alone = decode_attention(**small)
    torch.testing.assert_close(decode_attention(**large), alone, rtol=0, atol=0)
    shared = ("position", "cosines", "sines")
    twice = {name: part if name in shared else torch.cat((part, part)) for name, part in large.items()}
    torch.testing.assert_close(decode_attention(**twice), torch.cat((alone, alone)), rtol=0, atol=0)
    torch.testing.assert_close(alone.double(), _in_float64(small), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_in_the_cache_shows(broken: float) -> None:
    step = _step(50, 64, heads=4, kv_heads=2, size=8, dtype=torch.float32)
    step["cached_keys"][0, 0, 10, 3] = broken
    assert not decode_attention(**step).isfinite().all()


def test_scores_beyond_the_range_of_exponentials_give_no_overflow() -> None:
    step = _step(70, 80, heads=2, kv_heads=2, size=8, dtype=torch.float32)
    step["queries"] *= 1000
    expected = _in_float64(step)
    torch.testing.assert_close(decode_attention(**step).double(), expected, rtol=1e-3, atol=1e-3)
