"""Rows of several samples: the same loss and gradients as one sample a row, and no sample that another can see."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from qlora_pipe.cli import execute
from qlora_pipe.config import FinetuneConfig, Recompute
from qlora_pipe.data.batches import Batch, collate
from qlora_pipe.data.encode import Sample
from qlora_pipe.nn.attention import causal_attention, flash_packed
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.nn.packing import Packing
from qlora_pipe.testing import filled, tiny_weights
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.loss import summed_loss
from qlora_pipe.train.recompute import RecomputePlan
from qlora_pipe.train.session import adapt
from qlora_plugins.llama import register_architectures
from tests.pipe.runs import finetune_line, metrics, small_checkpoint, write_rows

LLAMA = register_architectures()[0]
CONFIG: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 71,
    "max_position_embeddings": 64,
}
ROWS = ((5, 11, 2), (17,), (1, 1, 13, 3))
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 6}


def samples_of(lengths: Sequence[int], *, seed: int = 0) -> list[Sample]:
    """Samples of which the model reads so many ids."""
    draws = np.random.default_rng(seed)
    return [
        Sample(
            ids=draws.integers(71, size=length + 1, dtype=np.int32),
            trained=np.arange(length + 1) > length // 3,
            origin=str(number),
        )
        for number, length in enumerate(lengths)
    ]


def in_rows(rows: Sequence[Sequence[int]], *, seed: int = 0) -> list[list[Sample]]:
    """Rows of samples of these lengths."""
    samples = iter(samples_of([length for row in rows for length in row], seed=seed))
    return [[next(samples) for _ in row] for row in rows]


def loaded(dtype: torch.dtype, *, dropout: float = 0.0, **overrides: Any) -> LoadedModel:
    """A LLaMA with adapters that are not zero, computing and training in `dtype`."""
    config = {**CONFIG, **overrides}
    module = filled(LLAMA, config, tiny_weights(config, seed=3), dtype=dtype)
    model = LoadedModel(module, LLAMA, config, {}, dtype, torch.device("cpu"))
    torch.manual_seed(1)
    adapt(model, FinetuneConfig(rank=3, dropout=dropout), start=None)
    for name, parameter in module.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter, dtype=dtype) * 0.2
    return model


def loss_and_gradients(model: LoadedModel, batches: Sequence[Batch], *, recompute: Recompute = "none") -> list[Tensor]:
    """The loss of one window and the gradient of each adapter."""
    model.module.train()
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    passes = BlockwisePass(model, recompute=RecomputePlan(recompute))
    losses = passes.run(batches, divisor=sum(batch.trained for batch in batches))
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    return [torch.stack(losses).sum(), *gradients]  # type: ignore[list-item]


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize(
    "overrides", [{}, {"attention_bias": True, "num_key_value_heads": 4}], ids=["grouped", "plain"]
)
def test_packed_rows_give_the_loss_and_the_gradients_of_samples_apart(
    overrides: dict[str, Any], recompute: Recompute
) -> None:
    model = loaded(torch.float64, **overrides)
    rows = in_rows(ROWS)
    packed = loss_and_gradients(model, [collate(rows, packed=True)], recompute=recompute)
    apart = loss_and_gradients(model, [collate([[sample] for row in rows for sample in row])], recompute=recompute)
    for one, other in zip(packed, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_frequencies_that_depend_on_the_length_depend_on_each_samples_own() -> None:
    model = loaded(torch.float64, **DYNAMIC)
    rows = in_rows(ROWS)
    packed = loss_and_gradients(model, [collate(rows, packed=True)])
    alone = [collate([[sample]]) for row in rows for sample in row]
    for one, other in zip(packed, loss_and_gradients(model, alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_of_one_sample_each_give_the_same_bits_packed_and_not(dtype: torch.dtype, dropout: float) -> None:
    model = loaded(dtype, dropout=dropout)
    rows = in_rows(((37,), (37,), (37,)))
    found = []
    for packed in (False, True):
        torch.manual_seed(5)
        found.append(loss_and_gradients(model, [collate(rows, packed=packed)]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_evaluation_gives_the_same_loss_for_packed_rows() -> None:
    model = loaded(torch.float64)
    rows = in_rows(ROWS)
    packed, apart = collate(rows, packed=True), collate([[sample] for row in rows for sample in row])
    torch.testing.assert_close(summed_loss(model, packed), summed_loss(model, apart), rtol=1e-12, atol=0)


@pytest.mark.parametrize("overrides", [{}, DYNAMIC], ids=["plain", "dynamic"])
def test_other_tokens_in_one_sample_change_no_bit_of_another(overrides: dict[str, Any]) -> None:
    model = loaded(torch.float32, **overrides)
    batch = collate(in_rows(ROWS), packed=True)
    assert batch.packing is not None
    with torch.no_grad():
        before = model.causal.head(model.causal.hidden(batch.ids, packing=batch.packing))
        for row, lengths in enumerate(ROWS):
            start = 0
            for length in lengths:
                ids = batch.ids.clone()
                ids[row, start : start + length] = (ids[row, start : start + length] + 1) % 71
                after = model.causal.head(model.causal.hidden(ids, packing=batch.packing))
                same = (after == before).all(-1)
                assert not same[row, start : start + length].any()
                same[row, start : start + length] = True
                assert same.all()
                start += length


def test_packed_attention_attends_in_each_sample_alone() -> None:
    draws = torch.Generator().manual_seed(0)
    packing = Packing.of(ROWS, width=19)
    queries, keys, values = (torch.randn(3, heads, 19, 6, generator=draws) for heads in (6, 2, 2))
    found = causal_attention(queries, keys, values, packing=packing)
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            here = (slice(row, row + 1), slice(None), slice(start, start + length))
            alone = causal_attention(queries[here], keys[here], values[here])
            assert torch.equal(found[row, start : start + length], alone[0])
            start += length
        assert not found[row, start:].any()


def _reference_varlen(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """[tokens, heads, head_dim] -> the same: attention in each span, by the formula."""
    assert starts.dtype == torch.int32
    out = torch.full_like(query, torch.nan)
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert end - begin <= longest
        scores = torch.einsum("thd,shd->hts", query[begin:end], key[begin:end]) / query.shape[-1] ** 0.5
        future = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hts,shd->thd", weights, value[begin:end])
    return out


def _of_torch_2_10(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    assert is_causal
    assert cu_seq_q is cu_seq_k
    assert max_q == max_k
    return _reference_varlen(query, key, value, cu_seq_q, max_q)


def _of_torch_2_11(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    return _of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=window_size == (-1, 0))


def _of_torch_2_12(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    return _of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


@pytest.mark.parametrize("varlen_attn", [_of_torch_2_10, _of_torch_2_11, _of_torch_2_12])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_the_one_kernel_for_all_samples_is_told_the_same_by_every_version_of_torch(
    monkeypatch: pytest.MonkeyPatch, varlen_attn: Any, kv_heads: int
) -> None:
    # The kernel itself runs on a GPU alone; here its arguments are checked by one that computes the formula.
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    packing = Packing.of(ROWS, width=19)
    inputs = [torch.randn(3, heads, 19, 8, dtype=torch.float64) for heads in (6, kv_heads, kv_heads)]
    found = []
    for attend in (flash_packed, lambda *inputs: causal_attention(*inputs[:3], packing=inputs[3])):
        leaves = [each.clone().requires_grad_() for each in inputs]
        mixed = attend(*leaves, packing)
        weights = torch.arange(mixed.numel(), dtype=torch.float64).view_as(mixed).cos()
        inside = torch.stack([torch.arange(19) < sum(row) for row in ROWS])
        (mixed * weights)[inside].sum().backward()
        found.append([mixed[inside], *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_packed_run_counts_real_tokens_and_says_the_same_of_the_held_out_samples(tmp_path: Path) -> None:
    base, rows = small_checkpoint(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", count=30)
    settings = {"held_out": 0.3, "max_tokens": 64, "accumulate": 1, "steps": 2, "dropout": 0, "batch_size": 50}
    for name, pack in (("apart", None), ("packed", True)):
        assert execute(finetune_line(base, rows, tmp_path / name, pack=pack, **settings)) == 0
    apart, packed = metrics(tmp_path / "apart"), metrics(tmp_path / "packed")
    assert packed[0]["eval_loss_start"] == pytest.approx(apart[0]["eval_loss_start"], rel=1e-6)
    samples = [json.loads(line) for line in rows.read_text().splitlines()]
    # The byte tokenizer adds BOS, which is read, and EOS, which is not.
    mean = sum(len(row["prompt"] + row["answer"]) + 1 for row in samples) / len(samples)
    # 50 rows: of one sample each, or of one or two.
    assert apart[0]["tokens"] == pytest.approx(50 * mean, rel=0.1)
    assert 1.3 * apart[0]["tokens"] < packed[0]["tokens"] <= 50 * 64
