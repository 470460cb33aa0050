"""The loss of a head that caps its logits, in chunks of rows and by autograd over all of them."""

import pytest
import torch
from torch import Tensor

from qlora_kernels import frozen_head
from qlora_pipe.data.batches import collate
from qlora_pipe.nn.decoder import DecoderModel
from qlora_pipe.nn.loaded import LoadedModel
from tests.pipe.test_packing import in_rows, loaded, loss_and_gradients


class Capped(DecoderModel):
    """A LLaMA whose logits are capped, as Gemma 2 caps them."""

    head_softcap = 0.6

    def head(self, hidden: Tensor) -> Tensor:
        return torch.tanh(super().head(hidden) / self.head_softcap) * self.head_softcap


class OpaqueHead(Capped):
    """The same, of which training knows nothing but what it computes."""

    head_weight = None


def of_kind(kind: type[DecoderModel]) -> LoadedModel:
    model = loaded(torch.float64)
    model.module.__class__ = kind
    return model


def test_a_capped_head_has_the_loss_and_the_gradients_that_autograd_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Five rows of 71 logits.
    monkeypatch.setattr(frozen_head, "CHUNK_BYTES", 5 * 71 * 8)
    batch = collate(in_rows(((17,), (5,), (11,))))
    found, wanted, uncapped = (
        loss_and_gradients(of_kind(kind), [batch]) for kind in (Capped, OpaqueHead, DecoderModel)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert abs(found[0] - uncapped[0]) > 0.01


def test_the_logits_of_a_capped_head_are_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capped, "head", lambda *_: pytest.fail("all logits were made"))
    loss_and_gradients(of_kind(Capped), [collate(in_rows(((17,),)))])
