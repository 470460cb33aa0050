"""The loss: cross-entropy of the trained tokens alone, summed, so that any split of a window adds up to the same."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_kernels.frozen_head import head_loss
from qlora_pipe.data.batches import IGNORE, Batch
from qlora_pipe.lanes import sent
from qlora_pipe.nn.loaded import LoadedModel

# Rows whose logits autograd makes at a time.
_ROWS = 1024


def summed_loss(model: LoadedModel, batch: Batch) -> Tensor:
    """Sum the cross-entropy over a batch's labels, in float32 or, for a model in float64, in that: a scalar."""
    hidden = model.language.hidden_of(batch.inputs_on(model.device))
    return loss_of_hidden(model, hidden, batch)


def loss_of_hidden(model: LoadedModel, hidden: Tensor, batch: Batch) -> Tensor:
    """The same from the hidden states [B, T, D] that the head reads.

    Only the rows that are trained on reach the head: the prompt's and the padding's logits are never made. Through a
    frozen head the gradient comes with the loss; any other, as one that is adapted, is left to autograd.
    """
    # Found on the CPU, where the labels are: a GPU would be waited for to learn how many there are.
    labels_BT = batch.labels.flatten()
    rows_N = (labels_BT != IGNORE).nonzero()[:, 0]
    hidden_ND = hidden.flatten(0, 1).index_select(0, sent(rows_N, model.device))
    labels_N = sent(labels_BT[rows_N], model.device)
    if (weight := model.language.head_weight) is not None:
        return head_loss(hidden_ND, weight, labels_N, softcap=model.language.head_softcap)
    parts = [
        functional.cross_entropy(_at_least_float32(model.language.head(rows)), labels, reduction="sum")
        for rows, labels in zip(torch.split(hidden_ND, _ROWS), torch.split(labels_N, _ROWS), strict=True)
    ]
    return torch.stack(parts).sum()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, in float32: a scalar."""
    norms = [torch.linalg.vector_norm(p.grad.float()) for p in parameters if p.grad is not None]
    return torch.stack(norms).square().sum().sqrt()
