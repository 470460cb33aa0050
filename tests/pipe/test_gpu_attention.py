"""Windows and capped scores on a GPU: the kernels against what a CPU computes."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qlora_pipe.nn import attention
from qlora_pipe.nn.attention import Scores, causal_attention, flash_packed
from qlora_pipe.nn.packing import Packing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

ROWS = ((5, 300, 2), (517,), (1, 1, 130, 33), (64, 128, 256, 63))
WIDTH = 520
RULES = [Scores(window=33), Scores(softcap=20.0, scale=0.1), Scores(window=129, softcap=20.0, scale=0.1)]


def drawn(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    draws = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(*shape, generator=draws).to(dtype) for shape in shapes]


def values_and_gradients(start: Sequence[Tensor], *, device: str, dtype: torch.dtype, **how: object) -> list[Tensor]:
    leaves = [each.to(device, dtype).requires_grad_() for each in start]
    mixed = causal_attention(*leaves, **how)  # type: ignore[arg-type]
    packing = how.get("packing")
    inside = torch.ones(mixed.shape[:2], dtype=torch.bool)
    if isinstance(packing, Packing):
        inside = torch.stack([torch.arange(mixed.shape[1]) < sum(row[:-1]) for row in packing.lengths])
    weights = torch.arange(mixed.numel()).view_as(mixed).cos() * inside[..., None]
    (mixed * weights.to(device, dtype)).float().sum().backward()
    assert mixed.isfinite().all()
    return [mixed[inside.to(device)].cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)]


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    tolerance = 1e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("scores", RULES, ids=str)
def test_values_and_gradients_are_those_of_the_cpu_at_any_length(
    scores: Scores, head_dim: int, dtype: torch.dtype
) -> None:
    for queries, keys in [(128, 128), (300, 300), (77, 500), (513, 513)]:
        start = drawn([(2, 6, queries, head_dim), (2, 2, keys, head_dim), (2, 2, keys, head_dim)], dtype)
        found = values_and_gradients(start, device="cuda", dtype=dtype, scores=scores)
        wanted = values_and_gradients(start, device="cpu", dtype=torch.float32, scores=scores)
        assert_same(found, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", RULES, ids=str)
def test_packed_rows_have_the_values_and_gradients_of_the_cpu(scores: Scores, dtype: torch.dtype) -> None:
    start = drawn([(len(ROWS), 6, WIDTH, 64), *[(len(ROWS), 2, WIDTH, 64)] * 2], dtype)
    packing = Packing.of(ROWS, width=WIDTH)
    on_gpu = packing.to(torch.device("cuda"))
    found = values_and_gradients(start, device="cuda", dtype=dtype, packing=on_gpu, scores=scores)
    wanted = values_and_gradients(start, device="cpu", dtype=torch.float32, packing=packing, scores=scores)
    assert_same(found, wanted, dtype)


@pytest.mark.skipif(not attention._torch_has_flash(), reason="needs torch 2.10")
@pytest.mark.parametrize("window", [1, 2, 33, 517])
def test_flash_sees_as_many_positions_as_a_window_has(window: int) -> None:
    start = drawn([(len(ROWS), 6, WIDTH, 64), *[(len(ROWS), 2, WIDTH, 64)] * 2], torch.bfloat16)
    scores, packing = Scores(window=window), Packing.of(ROWS, width=WIDTH)
    queries, keys, values = (each.cuda() for each in start)
    if not attention._flash_takes(queries, scores):
        pytest.skip("this torch's flash attention knows no windows, or this GPU has none")
    found = flash_packed(queries, keys, values, packing.to(torch.device("cuda")), scores=scores)
    wanted = causal_attention(*(each.float() for each in start), packing=packing, scores=scores)
    inside = torch.stack([torch.arange(WIDTH) < sum(row) for row in ROWS])
    torch.testing.assert_close(found.cpu()[inside].float(), wanted[inside], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("scores", RULES, ids=str)
def test_no_tensor_of_all_pairs_is_made(scores: Scores) -> None:
    tokens, heads, head_dim = 8192, 8, 64
    leaves = [each.cuda().requires_grad_() for each in drawn([(1, heads, tokens, head_dim)] * 3, torch.bfloat16)]
    causal_attention(*leaves, scores=scores).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    causal_attention(*leaves, scores=scores).sum().backward()
    # A mask of one byte for each pair would take 64 MiB, scores 1 GiB; a tensor like the queries takes 8.
    assert torch.cuda.max_memory_allocated() - held < 128 << 20


@pytest.mark.parametrize("scores", RULES, ids=str)
def test_with_and_without_gradients_the_bits_are_the_same(scores: Scores) -> None:
    queries, keys, values = (each.cuda() for each in drawn([(2, 6, 300, 64)] * 3, torch.bfloat16))
    with torch.no_grad():
        alone = causal_attention(queries, keys, values, scores=scores)
    assert torch.equal(causal_attention(queries.requires_grad_(), keys, values, scores=scores), alone)
