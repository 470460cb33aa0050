"""Packed rows and the bias by distance on a GPU: the kernels against what a CPU computes."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_pipe.cli import execute
from qlora_pipe.nn import attention
from qlora_pipe.nn.attention import causal_attention, flash_packed
from qlora_pipe.nn.packing import Packing
from qlora_pipe.nn.relative_bias import bias_by_distance, biased_attention, t5_bucket
from qlora_pipe.testing import tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

ROWS = ((5, 300, 2), (517,), (1, 1, 130, 33), (64, 128, 256, 63))
WIDTH = 520


needs_flash = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0) or not attention._torch_has_flash(),
    reason="needs a GPU of the Ampere generation or later, and torch 2.10",
)


def drawn(heads: Sequence[int], head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(len(ROWS), count, WIDTH, head_dim, generator=draws).to("cuda", dtype) for count in heads]


def on_gpu() -> Packing:
    return Packing.of(ROWS, width=WIDTH).to(torch.device("cuda"))


@needs_flash
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_flash_gives_the_values_and_gradients_of_each_sample_alone(
    dtype: torch.dtype, head_dim: int, kv_heads: int
) -> None:
    packing, inside = on_gpu(), torch.stack([torch.arange(WIDTH) < sum(row) for row in ROWS]).cuda()
    found = []
    for attend, wide in ((flash_packed, dtype), (attention._sample_by_sample, torch.float32)):
        leaves = [each.to(wide).requires_grad_() for each in drawn((6, kv_heads, kv_heads), head_dim, dtype)]
        mixed = attend(*leaves, packing)
        assert mixed.isfinite().all()
        weights = torch.arange(mixed.numel(), device="cuda").view_as(mixed).cos().to(dtype)
        (mixed * weights)[inside].float().sum().backward()
        found.append([mixed[inside], *(leaf.grad for leaf in leaves)])
    rounding = torch.finfo(dtype).eps
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.float(), other, rtol=4 * rounding, atol=4 * rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_values_in_one_sample_change_no_bit_of_another(dtype: torch.dtype) -> None:
    packing, inputs = on_gpu(), drawn((6, 2, 2), 64, dtype)
    before = causal_attention(*inputs, packing=packing)
    changed = [each.clone() for each in inputs]
    for each in changed:
        each[0, :, 5:305] += 1
    same = (causal_attention(*changed, packing=packing) == before).all(-1)
    assert not same[0, 5:305].any()
    same[0, 5:305] = True
    assert same.all()


@needs_flash
def test_flash_makes_no_tensor_of_all_pairs() -> None:
    tokens, heads, head_dim = 8192, 8, 64
    packing = Packing.of([[100] * 81], width=tokens).to(torch.device("cuda"))
    leaves = [torch.randn(1, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    causal_attention(*leaves, packing=packing).sum().backward()
    # A mask of one byte for each pair would take 64 MiB, scores 1 GiB; a tensor like the queries takes 8.
    assert torch.cuda.max_memory_allocated() - held < 128 << 20


def losses(work: Path, name: str, *flags: str) -> list[float]:
    settings = ["--steps", "8", "--batch-size", "4", "--rank", "4", "--learning-rate", "1e-2", "--dropout", "0"]
    command = ["finetune", str(work / "store"), "--data", f"jsonl:{work / 'rows.jsonl'}", "--out", str(work / name)]
    assert execute([*command, *settings, "--max-tokens", "96", "--pack", *flags]) == 0
    return [json.loads(line)["loss"] for line in (work / name / "metrics.jsonl").read_text().splitlines()]


def test_packed_training_follows_the_cpu(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "source")
    rows = [{"prompt": f"{n} and one is", "answer": f" {n + 1}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert execute(["quantize", str(tmp_path / "source"), str(tmp_path / "store")]) == 0
    on_cpu = losses(tmp_path, "cpu", "--device", "cpu")
    assert losses(tmp_path, "float32", "--device", "cuda", "--dtype", "float32") == pytest.approx(on_cpu, rel=1e-3)
    # Heads of 8 numbers: the one kernel for all samples serves these.
    half = losses(tmp_path, "float16", "--device", "cuda", "--dtype", "float16")
    assert half == pytest.approx(on_cpu, rel=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_bias_by_distance_gives_the_values_and_gradients_of_the_cpu_at_any_length(
    dtype: torch.dtype, causal: bool
) -> None:
    for queries, keys, short in [(128, 128, False), (300, 300, True), (77, 500, False), (513, 513, True)]:
        draws = torch.Generator().manual_seed(queries)
        shapes = ((2, 6, queries, 64), (2, 6, keys, 64), (2, 6, keys, 64), (6, 32))
        start = [torch.randn(shape, generator=draws).to(dtype) for shape in shapes]
        found = []
        for device, wide in (("cuda", dtype), ("cpu", torch.float32)):
            leaves = [each.to(device, wide).requires_grad_() for each in start]
            bias = bias_by_distance(
                leaves[3],
                lambda distances: t5_bucket(distances, buckets=32, farthest=128, both_ways=not causal),
                queries=queries,
                keys=keys,
            )
            lengths = torch.tensor([keys, keys // 2], device=device) if short else None
            mixed = biased_attention(*leaves[:3], bias=bias, causal=causal, scale=0.125, key_lengths=lengths)
            weights = torch.arange(mixed.numel(), device=device).view_as(mixed).cos()
            (mixed * weights.to(dtype)).float().sum().backward()
            found.append([mixed.cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)])
        tolerance = 1e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one.float(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())
