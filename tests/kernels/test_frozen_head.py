"""The frozen head's loss and gradient, against all logits at once and against float64."""

from collections.abc import Iterator

import pytest
import torch

from qlora_kernels import cpu, frozen_head, head_loss
from tests.kernels.heads import assert_rows_are_exact, peak_bytes, sample
from tests.kernels.paths import DTYPES, forced
from tests.kernels.rows import unwritten_is_nan


@pytest.fixture(params=cpu.paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param), unwritten_is_nan():
        yield request.param


@pytest.mark.parametrize("vocabulary", [1, 7, 33, 1000, 8193])
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_of_logits_are_those_of_float64(
    path: str, dtype: torch.dtype, rows: int, vocabulary: int
) -> None:
    assert_rows_are_exact(rows, vocabulary, dtype)


@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("chunk_bytes", [1, 8 * 33 * 5, 1 << 20])
@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
def test_any_chunks_give_the_loss_and_gradient_of_all_logits_at_once(
    softcap: float | None, chunk_bytes: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_head, "CHUNK_BYTES", chunk_bytes)
    hidden, head, labels = sample(17, 33, 8, torch.float64)
    hidden.requires_grad_()
    found, wanted = (
        f(hidden, head, labels, scale=scale, softcap=softcap) for f in (head_loss, frozen_head.head_loss_reference)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    for found_part, wanted_part in zip(*(torch.autograd.grad(loss, hidden) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(found_part, wanted_part, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_the_logits_gradient_times_the_head(path: str, dtype: torch.dtype) -> None:
    hidden, head, labels = sample(33, 131, 16, dtype)
    loss = head_loss(hidden.requires_grad_(), head, labels, scale=2.0)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    (found,) = torch.autograd.grad(loss, hidden, torch.tensor(0.5))
    logits = hidden.detach() @ head.T
    losses = torch.empty(33)
    frozen_head.cross_entropy(logits, labels, losses, scale=1.0, has_gradient=True)
    assert torch.equal(loss, losses.sum() * 2.0)
    torch.testing.assert_close(found, logits @ head, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("strip_bytes", [1, 3 * 4 * 131, 8 << 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capped_logits_are_rounded_once_and_their_slopes_too(
    path: str, dtype: torch.dtype, strip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_head, "_STRIP_BYTES", strip_bytes)
    hidden, head, labels = sample(33, 131, 16, dtype)
    loss = head_loss(hidden.requires_grad_(), head, labels, softcap=1.5)
    (found,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    wanted = frozen_head.head_loss_reference(exact, head.double(), labels, softcap=1.5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)
    bound = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), torch.autograd.grad(wanted, exact)[0], rtol=bound, atol=bound)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_without_gradients_the_loss_is_the_same(path: str, softcap: float | None) -> None:
    hidden, head, labels = sample(33, 131, 16, torch.float32)
    with torch.no_grad():
        alone = head_loss(hidden.requires_grad_(), head, labels, softcap=softcap)
    assert not alone.requires_grad
    assert torch.equal(alone, head_loss(hidden, head, labels, softcap=softcap))
    assert torch.equal(alone, head_loss(hidden.detach(), head, labels, softcap=softcap))


def test_a_head_of_another_dtype_is_used_in_its_own(path: str) -> None:
    hidden, head, labels = sample(33, 131, 16, torch.float32)
    loss = head_loss(hidden.requires_grad_(), head.bfloat16(), labels)
    loss.backward()
    same = hidden.detach().bfloat16().requires_grad_()
    assert torch.equal(loss, head_loss(same, head.bfloat16(), labels))
    loss = head_loss(same, head.bfloat16(), labels)
    loss.backward()
    assert hidden.grad.dtype == torch.float32
    assert torch.equal(hidden.grad, same.grad.float())


def test_a_float16_gradient_scaled_inside_does_not_vanish(path: str) -> None:
    labels, off_label = torch.tensor([5]), torch.arange(20_000) != 5
    for scale, exact in ((1e-4, 0.0), (1024.0, 1024 / 20_000)):
        logits, losses = torch.zeros(1, 20_000, dtype=torch.float16), torch.empty(1)
        frozen_head.cross_entropy(logits, labels, losses, scale=scale, has_gradient=True)
        torch.testing.assert_close(logits[0, off_label].float(), torch.full((19_999,), exact), rtol=1e-3, atol=0)


@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_memory_is_taken_than_for_a_few_chunks(path: str, dtype: torch.dtype, vocabulary: int) -> None:
    hidden, head, labels = sample(600, vocabulary, 8, dtype)
    hidden.requires_grad_()
    peak = peak_bytes(lambda: head_loss(hidden, head, labels).backward())
    # All logits of the large one would be 77 MB at the least, and twice that with their float32 copy.
    assert 0 < peak <= 64 << 20
    # The slopes are as many as the logits of a chunk; two strips in float32 are worked on at a time.
    capped = peak_bytes(lambda: head_loss(hidden, head, labels, softcap=30.0).backward())
    assert capped <= peak + (48 << 20)


def test_a_gradient_is_handed_out_once() -> None:
    hidden, head, labels = sample(7, 33, 8, torch.float32)
    loss = head_loss(hidden.requires_grad_(), head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


def test_no_rows_have_no_loss(path: str) -> None:
    hidden, head, labels = sample(0, 33, 8, torch.float32)
    loss = head_loss(hidden.requires_grad_(), head, labels)
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == (0, 8)


def test_a_row_that_is_no_number_has_no_loss(path: str) -> None:
    for bad in (torch.nan, torch.inf):
        logits, losses = torch.zeros(3, 33), torch.empty(3)
        logits[1, 20] = bad
        frozen_head.cross_entropy(logits, torch.tensor([0, 1, 2]), losses, scale=1.0, has_gradient=True)
        assert losses.isfinite().tolist() == [True, False, True]
        assert logits.isfinite().all(1).tolist() == [True, False, True]


def test_what_does_not_fit_is_refused() -> None:
    hidden, head, labels = sample(7, 33, 8, torch.float32)
    with pytest.raises(ValueError, match="frozen"):
        head_loss(hidden, head.clone().requires_grad_(), labels)
    for wrong in (-1, 33, -100):
        with pytest.raises(ValueError, match="are not all in a vocabulary of 33"):
            head_loss(hidden, head, labels.index_fill(0, torch.tensor([3]), wrong))
    with pytest.raises(ValueError, match="int64"):
        head_loss(hidden, head, labels.int())
    with pytest.raises(ValueError, match="do not fit"):
        head_loss(hidden[:, :7], head, labels)
    with pytest.raises(ValueError, match="do not fit"):
        head_loss(hidden, head, labels[:6])
    with pytest.raises(ValueError, match="a cap of 0"):
        head_loss(hidden, head, labels, softcap=0)
