"""The decoder that families share: its switches each change what they are to, and blocks may be a family's own."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qlora_pipe.nn.attention import PLAIN, Scores, causal_attention
from qlora_pipe.nn.decoder import Attention, Block, DecoderConfig, DecoderModel, Told
from qlora_pipe.nn.mlp import GATES, GatedMLP
from qlora_pipe.nn.norm import RMSNorm
from qlora_pipe.nn.rotary import Rotary, default_frequencies
from qlora_pipe.nn.sizes import Sizes

CONFIG = DecoderConfig(
    sizes=Sizes(vocabulary=71, hidden=40, intermediate=56, layers=2, heads=4, kv_heads=2, head_dim=6),
    rotary=Rotary(default_frequencies(6, 10_000.0), context=64),
    norm=partial(RMSNorm, eps=1e-5),
    gate=GATES["silu"],
    scores=(PLAIN, PLAIN),
)


def in_double(make: Callable[[], nn.Module]) -> nn.Module:
    """A module with every parameter drawn, norms and biases too."""
    module = make().double()
    draws = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
        parameter.data = drawn * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2 * drawn + ("norm" in name)
    return module.eval().requires_grad_(False)


def turned(x: Tensor) -> Tensor:
    """Queries or keys [B, H, T, head_dim] at positions 0 to T - 1, turned as the method's paper has it."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * default_frequencies(2 * half, 10_000.0)
    cosines, sines = angles.cos().double(), angles.sin().double()
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


@pytest.mark.parametrize("scores", [PLAIN, Scores(window=3), Scores(window=4, softcap=0.7, scale=0.3)])
@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True)])
def test_attention_is_projected_normalised_turned_mixed_and_projected(
    biases: tuple[bool, bool], head_norms: bool, scores: Scores
) -> None:
    config = replace(CONFIG, qkv_bias=biases[0], o_bias=biases[1], head_norms=head_norms, scores=(PLAIN, scores))
    attention = in_double(lambda: Attention(config, layer=1))
    named = dict(attention.named_parameters())
    x = torch.randn(2, 9, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (
        nn.functional.linear(x, named[f"{name}_proj.weight"], named.get(f"{name}_proj.bias")).unflatten(-1, (-1, 6))
        for name in "qkv"
    )
    if head_norms:
        q, k = (
            part / (part.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * named[f"{name}_norm.weight"]
            for name, part in (("q", q), ("k", k))
        )
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    mixed = causal_attention(turned(q), turned(k), v, scores=scores)
    expected = nn.functional.linear(mixed, named["o_proj.weight"], named.get("o_proj.bias"))
    tables = CONFIG.rotary.tables(torch.arange(9), length=9, like=x)
    # A norm computes in float32.
    bound = 1e-5 if head_norms else 1e-12
    torch.testing.assert_close(attention(x, Told(*tables, None, None)), expected, rtol=0, atol=bound)


class Parallel(nn.Module):
    """A block of another kind: attention and feed-forward read the same, and both are added."""

    def __init__(self, config: DecoderConfig, *, layer: int) -> None:
        super().__init__()
        sizes = config.sizes
        self.norm = config.norm(sizes.hidden)
        self.self_attn = Attention(config, layer=layer)
        self.mlp = GatedMLP(sizes.hidden, sizes.intermediate, gate=config.gate)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        normed = self.norm(x)
        after: Tensor = x + self.self_attn(normed, told) + self.mlp(normed)
        return after


def test_a_family_may_bring_blocks_of_its_own() -> None:
    model = in_double(lambda: DecoderModel(CONFIG, blocks=[Parallel(CONFIG, layer=layer) for layer in range(2)]))
    assert isinstance(model, DecoderModel)
    assert [type(block) for block in model.blocks] == [Parallel, Parallel]
    ids = torch.randint(71, (2, 14), generator=torch.Generator().manual_seed(1))
    state, told = model.embed(ids)
    for block in model.blocks:
        state = block(state, told)
    whole = model(ids)
    assert torch.equal(whole, model.head(model.finish(state)))
    cache = model.new_cache(2, 14)
    pieces = [model(piece, cache=cache) for piece in torch.split(ids, [9, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)


def test_without_any_the_blocks_are_those_of_llama() -> None:
    with torch.device("meta"):
        assert [type(block) for block in DecoderModel(CONFIG).blocks] == [Block, Block]
