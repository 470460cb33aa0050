"""Rotation's samples and what must hold of them, for every way that it goes."""

import torch

from qlora_kernels import rotate, rotate_reference
from tests.kernels.rows import gradients, normal


def sample(
    tokens: int, head_dim: int, dtype: torch.dtype, *, per_row: bool = False, device: object = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two sequences with three heads, as a projection's output lies; and tables, whose halves differ."""
    x = normal(2, tokens, 3, head_dim, dtype=dtype, device=device).transpose(1, 2)
    shape = (2, tokens, head_dim) if per_row else (tokens, head_dim)
    cosines, sines = (normal(*shape, dtype=dtype, seed=seed, device=device) for seed in (1, 2))
    return x, cosines, sines


def assert_turns_as_the_reference(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
    """Bit for bit: the result, in place too, and the gradient, of any layout."""
    for leaf in (x, x.contiguous()):
        wanted = rotate_reference(leaf, cosines, sines)
        assert torch.equal(rotate(leaf, cosines, sines), wanted)
        assert torch.equal(rotate(leaf.clone(), cosines, sines, inplace=True), wanted)
        mine, others = (leaf.clone().requires_grad_() for _ in range(2))
        (found,) = gradients([rotate(mine, cosines, sines)], [mine])
        (expected,) = gradients([rotate_reference(others, cosines, sines)], [others])
        assert torch.equal(found, expected)
