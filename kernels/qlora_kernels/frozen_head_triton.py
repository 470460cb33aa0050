"""Cross-entropy of rows of logits on a GPU, and its gradient written over them: the kernel and its launcher.

The meaning is in frozen_head.py, as is the shape legend. One program walks through one row, W logits at a time: once
for the maximum and the sum of exponentials, and once more, out of the cache, for the gradient.
"""

from collections.abc import Iterator
from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from qlora_kernels.variant import Variant

_MOST_AT_ONCE: Final = 4096


@triton.jit  # type: ignore[untyped-decorator]
def cross_entropy_kernel(  # noqa: PLR0917
    logits_RV: tl.tensor,
    labels_R: tl.tensor,
    losses_R: tl.tensor,
    vocabulary: tl.tensor,
    scale: tl.tensor,
    WIDTH: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
) -> None:
    """With HAS_GRADIENT, scale * (softmax - onehot) takes the logits' place."""
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_RV + row * vocabulary
    label = tl.load(labels_R + row)
    place_W = tl.arange(0, WIDTH)
    # Each place keeps a maximum and a sum of its own, so that the row is reduced once, at the end.
    most_W = tl.full([WIDTH], -float("inf"), tl.float32)
    sum_W = tl.zeros([WIDTH], tl.float32)
    for start in range(0, vocabulary, WIDTH):
        inside_W = start + place_W < vocabulary
        logit_W = tl.load(logits_V + start + place_W, mask=inside_W, other=-float("inf")).to(tl.float32)
        new_W = tl.maximum(most_W, logit_W)
        # Where nothing has been seen yet, both are minus infinity, whose difference is no number.
        kept_W = tl.where(most_W == new_W, 1.0, tl.exp(most_W - new_W))
        here_W = tl.where(logit_W == new_W, 1.0, tl.exp(logit_W - new_W))
        sum_W = sum_W * kept_W + tl.where(inside_W, here_W, 0.0)
        most_W = new_W
    most = tl.max(most_W, axis=0)
    total = tl.sum(sum_W * tl.exp(most_W - most), axis=0)
    is_label = (label >= 0) & (label < vocabulary)
    picked = tl.load(logits_V + label, mask=is_label, other=float("nan")).to(tl.float32)
    tl.store(losses_R + row, tl.log(total) + (most - picked))
    if HAS_GRADIENT:
        # The label's logit is read above before it is written here.
        tl.debug_barrier()
        factor = scale / total
        for start in range(0, vocabulary, WIDTH):
            inside_W = start + place_W < vocabulary
            logit_W = tl.load(logits_V + start + place_W, mask=inside_W, other=0.0).to(tl.float32)
            gradient_W = tl.exp(logit_W - most) * factor
            gradient_W = tl.where(start + place_W == label, gradient_W - scale, gradient_W)
            tl.store(logits_V + start + place_W, gradient_W.to(logits_RV.dtype.element_ty), mask=inside_W)


def cross_entropy_triton(
    logits_RV: Tensor, labels_R: Tensor, losses_R: Tensor, *, scale: float, has_gradient: bool
) -> None:
    """Fill losses, and write the gradient times `scale` over the logits."""
    rows, vocabulary = logits_RV.shape
    if rows:
        cross_entropy_kernel[(rows,)](
            logits_RV, labels_R, losses_R, vocabulary, float(scale), HAS_GRADIENT=has_gradient, **_form(vocabulary)
        )


def _form(vocabulary: int) -> dict[str, Any]:
    places = min(_MOST_AT_ONCE, triton.next_power_of_2(vocabulary))
    return {"WIDTH": places, "num_warps": max(1, places // 512)}


def variants() -> Iterator[Variant]:
    """The forms that are launched, for ahead_of_time.py."""
    for dtype in ("fp32", "fp16", "bf16"):
        for has_gradient in (False, True) if dtype == "bf16" else (True,):
            form = _form(128_256)
            constants = {"WIDTH": form.pop("WIDTH"), "HAS_GRADIENT": has_gradient}
            signature = {
                "logits_RV": f"*{dtype}",
                "labels_R": "*i64",
                "losses_R": "*fp32",
                "vocabulary": "i32",
                "scale": "fp32",
            }
            name = f"cross_entropy_{'gradient_' if has_gradient else ''}{dtype}"
            yield Variant(name, cross_entropy_kernel, signature, constants, form, ("vocabulary",))
