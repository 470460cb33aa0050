"""Attention of one new token over a cache: its meaning, by the definition."""

import math

import pytest
import torch

from qlora_kernels import decode_attention


def _caches(*shape: int, filled: int) -> tuple[torch.Tensor, torch.Tensor]:
    cached = torch.full((2, *shape), math.nan, dtype=torch.float64)
    cached[..., :filled, :] = torch.randn(2, *shape[:2], filled, shape[3], dtype=torch.float64)
    return cached[0].clone(), cached[1].clone()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("length", [0, 9])
@pytest.mark.parametrize(
    ("window", "softcap", "scale"),
    [(None, None, None), (1, None, 0.3), (4, 1.5, None), (10, 0.7, 2.0), (99, None, 0.1)],
)
def test_each_head_mixes_the_values_by_the_softmax_of_its_scores(  # noqa: PLR0917
    window: int | None, softcap: float | None, scale: float | None, length: int, heads: int, kv_heads: int
) -> None:
    torch.manual_seed(0)
    cached_keys, cached_values = _caches(2, kv_heads, 13, 6, filled=length)
    queries = torch.randn(2, heads, 1, 6, dtype=torch.float64)
    keys, values = torch.randn(2, 2, kv_heads, 1, 6, dtype=torch.float64)
    angles = torch.rand(3, dtype=torch.float64).mul(6).repeat(2)
    mixed = decode_attention(
        queries,
        keys,
        values,
        cached_keys=cached_keys,
        cached_values=cached_values,
        position=torch.tensor([length]),
        cosines=angles.cos(),
        sines=angles.sin(),
        window=window,
        softcap=softcap,
        scale=scale,
    )

    # As complex numbers, a turn is a product.
    def turned(x: torch.Tensor) -> torch.Tensor:
        product = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones(3, dtype=torch.float64), angles[:3])
        return torch.cat((product.real, product.imag), dim=-1)

    torch.testing.assert_close(cached_keys[:, :, length], turned(keys)[:, :, 0], rtol=0, atol=1e-14)
    torch.testing.assert_close(cached_values[:, :, length], values[:, :, 0], rtol=0, atol=0)
    assert cached_keys[:, :, length + 1 :].isnan().all()
    first = max(0, length + 1 - (window or length + 1))
    expected = torch.empty(2, 1, heads, 6, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // kv_heads)
        seen_keys, seen_values = (part[:, group, first : length + 1] for part in (cached_keys, cached_values))
        scores = torch.einsum("bd,bsd->bs", turned(queries)[:, head, 0], seen_keys) * (scale or 6**-0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        expected[:, 0, head] = torch.einsum("bs,bsd->bd", scores.softmax(-1), seen_values)
    torch.testing.assert_close(mixed, expected.flatten(2), rtol=0, atol=1e-14)


def test_sixteen_bits_are_summed_in_float32_and_rounded_once() -> None:
    torch.manual_seed(1)
    caches = [part.bfloat16() for part in _caches(1, 2, 70, 8, filled=64)]
    new = [torch.randn(1, heads, 1, 8).bfloat16() for heads in (4, 2, 2)]
    wide = [part.double() for part in (*caches, *new)]
    position = torch.tensor([64])
    mixed = decode_attention(*new, cached_keys=caches[0], cached_values=caches[1], position=position)
    expected = decode_attention(*wide[2:], cached_keys=wide[0], cached_values=wide[1], position=position)
    torch.testing.assert_close(mixed.double(), expected, rtol=torch.finfo(torch.bfloat16).eps / 2 + 1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    keys, values = torch.zeros(2, 1, 2, 5, 6)
    one, many = torch.zeros(1, 2, 1, 6), torch.zeros(1, 3, 1, 6)
    position = torch.tensor([0])
    with pytest.raises(ValueError, match="H a multiple of KV"):
        decode_attention(many, one, one, cached_keys=keys, cached_values=values, position=position)
    with pytest.raises(ValueError, match="do not fit caches"):
        decode_attention(one, one, one[..., :4], cached_keys=keys, cached_values=values, position=position)
    with pytest.raises(ValueError, match="must have one type"):
        decode_attention(one, one, one.half(), cached_keys=keys, cached_values=values, position=position)
    with pytest.raises(ValueError, match="a window of 0 or a cap of None leaves nothing"):
        decode_attention(one, one, one, cached_keys=keys, cached_values=values, position=position, window=0)
    with pytest.raises(ValueError, match=r"a window of None or a cap of -1\.0 leaves nothing"):
        decode_attention(one, one, one, cached_keys=keys, cached_values=values, position=position, softcap=-1.0)
    strided = torch.zeros(1, 5, 2, 6).transpose(1, 2)
    with pytest.raises(ValueError, match="be contiguous"):
        decode_attention(one, one, one, cached_keys=strided, cached_values=values, position=position)
