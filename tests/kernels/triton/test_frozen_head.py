"""The cross-entropy kernel against float64, and the head around it."""

import pytest
import torch

from qlora_kernels import frozen_head, head_loss
from tests.kernels.heads import assert_rows_are_exact, peak_bytes, sample
from tests.kernels.rows import DEVICE, GPU_DTYPES, unwritten_is_nan


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (7, 33), (33, 1000), (3, 8193)])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_losses_and_gradients_of_logits_are_those_of_float64(dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    assert_rows_are_exact(rows, vocabulary, dtype, device=DEVICE)


@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_chunks_give_the_loss_and_gradient_of_all_logits_at_once(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_head, "CHUNK_BYTES", 5 * 33 * 4)
    hidden, head, labels = sample(17, 33, 8, torch.float32, device=DEVICE)
    hidden.requires_grad_()
    with unwritten_is_nan():
        losses = [f(hidden, head, labels, scale=scale) for f in (head_loss, frozen_head.head_loss_reference)]
        found, wanted = (torch.autograd.grad(loss, hidden)[0] for loss in losses)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_logits_of_minus_infinity_have_no_share_and_nan_spoils_its_row_alone() -> None:
    for vocabulary in (33, 5000):
        logits = torch.zeros(3, vocabulary, device=DEVICE)
        logits[0, :20], logits[1, 30] = -torch.inf, torch.nan
        losses = torch.empty(3, device=DEVICE)
        labels = torch.tensor([25, 1, 2], device=DEVICE)
        wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        frozen_head.cross_entropy(logits, labels, losses, scale=1.0, has_gradient=True)
        torch.testing.assert_close(losses, wanted, equal_nan=True)
        assert not logits[0, :20].any()
        assert logits.isfinite().all(1).tolist() == [True, False, True]


def test_a_label_outside_of_the_vocabulary_has_no_loss() -> None:
    losses = torch.empty(3, device=DEVICE)
    labels = torch.tensor([-100, 33, 32], device=DEVICE)
    frozen_head.cross_entropy(torch.zeros(3, 33, device=DEVICE), labels, losses, scale=1.0, has_gradient=True)
    assert losses.isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
def test_a_head_adds_one_chunk_of_logits(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = DEVICE.type == "cuda"
    rows, width, dtype = (4096, 1024, torch.bfloat16) if on_gpu else (9, 8, torch.float32)
    chunk = frozen_head.CHUNK_BYTES if on_gpu else 4 * vocabulary * dtype.itemsize
    monkeypatch.setattr(frozen_head, "CHUNK_BYTES", chunk)
    hidden, head, labels = sample(rows, vocabulary, width, dtype, device=DEVICE)
    hidden.requires_grad_()
    added = peak_bytes(lambda: head_loss(hidden, head, labels).backward())
    # The gradient of hidden is asked for, and is as large as hidden; the rest is room for matrix products.
    assert 0 < added - hidden.nbytes <= chunk + (chunk if on_gpu else 64 << 10)
