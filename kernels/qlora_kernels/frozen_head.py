"""The cross-entropy of a frozen head: loss and gradient in one pass over chunks of rows, never the logits of a batch.

Shapes: hidden [N, D], head [V, D], labels [N]; R rows in a chunk.

A chunk's logits are made, turned into their gradient softmax(logits) - onehot(label) where they lie, and multiplied by
the head again. So the gradient of `hidden` is there when the loss is, and the logits are never made twice. Where logits
are capped (arXiv 2408.00118), the cap's slopes are kept beside them for as long.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kernels import rows_cpu
from qlora_kernels.product_type import product_type
from qlora_kernels.row_way import row_way

# Bytes of one chunk of logits. Of smaller ones a CPU's matrix products are slower, whatever stays in the caches.
CHUNK_BYTES: Final = 32 << 20
# Bytes of float32 that plain torch works on at a time.
_STRIP_BYTES: Final = 8 << 20


def head_loss_reference(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The meaning, in plain torch, with all logits at once."""
    logits_NV = (hidden_ND.to(head_VD.dtype) @ head_VD.T).to(_wide(head_VD.dtype))
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum") * scale


def head_loss(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """`scale` times the summed cross-entropy of the logits hidden head^T: a scalar in float32 (float64 for float64).

    With a `softcap` the logits z become softcap * tanh(z / softcap), computed in float32 and rounded to their type.
    Every row counts; rows that are not trained on are left out by the caller. The head is frozen and used in its own
    dtype. In float16 give the loss scale as `scale`: the logits' gradients are at most that, and what is below 6e-8 is
    lost.

    The gradient of `hidden` is computed here, where it is needed, and handed out by the backward pass, once. Beyond it,
    memory for one chunk of logits is needed, of 32 MiB (or one row), or for two where they are capped.

    Raises ValueError for shapes that do not fit, a head that requires a gradient, a cap that is not above 0, and on a
    CPU for labels outside of 0 to V; on a GPU, where to look would wait for it, such a row's loss is NaN.
    """
    _check(hidden_ND, head_VD, labels_N)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"a cap of {softcap} leaves nothing of the logits: it is above 0")
    needs_gradient = hidden_ND.requires_grad and torch.is_grad_enabled()
    return _HeadLoss.apply(hidden_ND, head_VD, labels_N, scale, softcap, needs_gradient)  # type: ignore[no-any-return, no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        scale: float,
        softcap: float | None,
        needs_gradient: bool,
    ) -> Tensor:
        ctx.gradient_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if needs_gradient else None
        return forward(hidden_ND, head_VD, labels_N, scale=scale, softcap=softcap, gradient_ND=ctx.gradient_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if ctx.gradient_ND is None:
            raise RuntimeError("the gradient of a head's loss is handed out once: compute the loss again")
        gradient_ND, ctx.gradient_ND = ctx.gradient_ND, None
        return gradient_ND.mul_(dloss), None, None, None, None, None


def forward(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    scale: float,
    softcap: float | None,
    gradient_ND: Tensor | None,
) -> Tensor:
    """The loss without autograd; its gradient is written to `gradient_ND`, contiguous and of hidden's dtype."""
    hidden_ND, head_VD = hidden_ND.detach(), head_VD.detach()
    rows, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
    losses_N = torch.empty(rows, dtype=_wide(head_VD.dtype), device=hidden_ND.device)
    chunk_rows = rows_of_a_chunk(head_VD, rows)
    chunk_RV = torch.empty(chunk_rows, vocabulary, dtype=head_VD.dtype, device=hidden_ND.device)
    capped = softcap is not None and gradient_ND is not None
    slopes_RV = torch.empty_like(chunk_RV) if capped else None
    for start in range(0, rows, chunk_rows):
        here = slice(start, min(start + chunk_rows, rows))
        hidden_RD = hidden_ND[here].to(head_VD.dtype)
        logits_RV = chunk_RV[: hidden_RD.shape[0]]
        _make_logits(hidden_RD, head_VD, logits_RV)
        if softcap is not None:
            _cap(logits_RV, None if slopes_RV is None else slopes_RV[: len(logits_RV)], softcap)
        cross_entropy(logits_RV, labels_N[here], losses_N[here], scale=scale, has_gradient=gradient_ND is not None)
        if gradient_ND is None:
            continue
        if slopes_RV is not None:
            logits_RV *= slopes_RV[: len(logits_RV)]
        _turn_back(logits_RV, head_VD, gradient_ND[here])
    return losses_N.sum() * scale


def _make_logits(hidden_RD: Tensor, head_VD: Tensor, logits_RV: Tensor) -> None:
    if product_type(head_VD) == head_VD.dtype:
        torch.mm(hidden_RD, head_VD.T, out=logits_RV)
        return
    wide_RD = hidden_RD.to(product_type(head_VD))
    for strip_VD, columns_RV in _strips(head_VD, logits_RV):
        columns_RV.copy_(wide_RD @ strip_VD.T)


def _cap(logits_RV: Tensor, slopes_RV: Tensor | None, softcap: float) -> None:
    """Cap logits where they lie; `slopes_RV` gets what the gradient of capped ones is multiplied with."""
    for start in range(0, len(logits_RV), _rows_of_a_strip(logits_RV)):
        here = slice(start, start + _rows_of_a_strip(logits_RV))
        share = logits_RV[here].to(_wide(logits_RV.dtype)).div_(softcap).tanh_()
        if slopes_RV is not None:
            slopes_RV[here] = share.square().neg_().add_(1)
        logits_RV[here] = share.mul_(softcap)


def _rows_of_a_strip(logits_RV: Tensor) -> int:
    return max(1, _STRIP_BYTES // (4 * logits_RV.shape[1]))


def _turn_back(logits_RV: Tensor, head_VD: Tensor, gradient_RD: Tensor) -> None:
    """From the logits' gradient that of the hidden states."""
    wide = product_type(head_VD)
    if wide != head_VD.dtype:
        sum_RD = torch.zeros(gradient_RD.shape, dtype=wide, device=gradient_RD.device)
        for strip_VD, columns_RV in _strips(head_VD, logits_RV):
            sum_RD.addmm_(columns_RV.to(wide), strip_VD)
        gradient_RD.copy_(sum_RD)
    elif gradient_RD.dtype == head_VD.dtype:
        torch.mm(logits_RV, head_VD, out=gradient_RD)
    else:
        gradient_RD.copy_(logits_RV @ head_VD)


def _strips(head_VD: Tensor, logits_RV: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The head a few words at a time, in the type that products run in, each with its columns of the logits."""
    words = max(1, _STRIP_BYTES // (4 * head_VD.shape[1]))
    for strip_VD, columns_RV in zip(torch.split(head_VD, words), torch.split(logits_RV, words, dim=1), strict=True):
        yield strip_VD.to(product_type(head_VD)), columns_RV


def rows_of_a_chunk(head_VD: Tensor, rows: int) -> int:
    """How many rows of logits are made at a time, of `rows`."""
    return max(1, min(rows, CHUNK_BYTES // (head_VD.shape[0] * head_VD.itemsize)))


def cross_entropy(logits_RV: Tensor, labels_R: Tensor, losses_R: Tensor, *, scale: float, has_gradient: bool) -> None:
    """Fill the losses of contiguous rows; with `has_gradient` the gradient times `scale` takes the logits' place.

    Without, the logits are of no use afterwards.
    """
    way = row_way(logits_RV)
    if way == "triton":
        # Imported here because Triton exists on Linux only and takes 0.4 s, which a run on a CPU need not pay.
        from qlora_kernels.frozen_head_triton import cross_entropy_triton  # noqa: PLC0415

        cross_entropy_triton(logits_RV, labels_R, losses_R, scale=scale, has_gradient=has_gradient)
    elif way == "c":
        rows_cpu.cross_entropy(logits_RV, labels_R, losses_R, scale=scale, has_gradient=has_gradient)
    else:
        strip = _rows_of_a_strip(logits_RV)
        for rows in zip(*(torch.split(part, strip) for part in (logits_RV, labels_R, losses_R)), strict=True):
            _cross_entropy_reference(*rows, scale=scale, has_gradient=has_gradient)


def _cross_entropy_reference(
    logits_RV: Tensor, labels_R: Tensor, losses_R: Tensor, *, scale: float, has_gradient: bool
) -> None:
    wide_RV = logits_RV.to(losses_R.dtype)
    wide_RV -= wide_RV.amax(-1, keepdim=True)
    label_R1 = labels_R[:, None]
    picked_R = wide_RV.gather(1, label_R1)[:, 0]
    sums_R = wide_RV.exp_().sum(-1)
    torch.sub(sums_R.log(), picked_R, out=losses_R)
    if has_gradient:
        wide_RV *= (scale / sums_R)[:, None]
        wide_RV.scatter_add_(1, label_R1, wide_RV.new_full(label_R1.shape, -scale))
        logits_RV.copy_(wide_RV)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> None:
    if head_VD.requires_grad:
        raise ValueError("this head is frozen: call requires_grad_(False) on its weight")
    if hidden_ND.ndim != 2 or head_VD.shape[1:] != hidden_ND.shape[1:] or labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"hidden {list(hidden_ND.shape)}, head {list(head_VD.shape)} and labels {list(labels_N.shape)} do not fit:"
            " [N, D], [V, D] and [N] do"
        )
    if labels_N.dtype != torch.int64:
        raise ValueError(f"labels are int64, not {labels_N.dtype}")
    if labels_N.device.type == "cpu" and labels_N.numel():
        least, most = (int(bound) for bound in torch.aminmax(labels_N))
        if least < 0 or most >= head_VD.shape[0]:
            raise ValueError(f"labels from {least} to {most} are not all in a vocabulary of {head_VD.shape[0]}")
