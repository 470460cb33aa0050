"""The row-wise operations of a training step through the C library, for float32 and bfloat16 on a CPU.

Rows are shared out among threads; no result depends on how many there are. Their meanings are in norm.py,
rotary.py, gated.py and frozen_head.py. Tensors are contiguous unless said otherwise.
"""

import ctypes
from functools import cache
from typing import Final

import torch
from torch import Tensor

from qlora_kernels import cpu
from qlora_kernels.library import call
from qlora_kernels.threads import in_shares

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 2}
# The C arrays that hold one row, and one head.
WIDEST_ROW: Final = 16_384
WIDEST_HEAD: Final = 512
# Elements that are work for one thread alone: to wake another takes some 50 microseconds.
_SMALLEST_SHARE: Final = 1 << 18
_ACTIVATIONS: Final = {"silu": 0, "gelu_tanh": 1}


class _RmsNorm(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("delta", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("roots", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("path", ctypes.c_int32),
        ("unit_offset", ctypes.c_int32),
    )


class _RmsNormBackward(ctypes.Structure):
    _fields_ = (
        ("dy", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("roots", ctypes.c_void_p),
        ("dtotal", ctypes.c_void_p),
        ("dx", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("path", ctypes.c_int32),
        ("unit_offset", ctypes.c_int32),
    )


class _Rotary(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_head", "x_token")),
        *((name, ctypes.c_int64) for name in ("out_batch", "out_head", "out_token")),
        ("table_batch", ctypes.c_int64),
        ("back", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("path", ctypes.c_int32),
    )


class _Gated(ctypes.Structure):
    _fields_ = (
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("path", ctypes.c_int32),
    )


class _GatedBackward(ctypes.Structure):
    _fields_ = (
        ("dy", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("dgate", ctypes.c_void_p),
        ("dup", ctypes.c_void_p),
        ("activation", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("path", ctypes.c_int32),
    )


class _CrossEntropy(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("vocabulary", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("has_gradient", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("path", ctypes.c_int32),
    )


def rms_norm(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, *, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (x itself without one), its norm, and the reciprocal roots [T] in float32."""
    y_TD, roots_T = torch.empty_like(x_TD), torch.empty(x_TD.shape[0], dtype=torch.float32, device="cpu")
    total_TD = x_TD if delta_TD is None else torch.empty_like(x_TD)
    task = _RmsNorm(
        x=x_TD.data_ptr(),
        delta=None if delta_TD is None else delta_TD.data_ptr(),
        total=None if delta_TD is None else total_TD.data_ptr(),
        weight=weight_D.data_ptr(),
        y=y_TD.data_ptr(),
        roots=roots_T.data_ptr(),
        width=x_TD.shape[1],
        eps=eps,
        dtype=DTYPES[x_TD.dtype],
        path=cpu.path_number(),
        unit_offset=unit_offset,
    )
    in_shares(call("rms_norm", task), x_TD.shape[0], smallest=_rows(x_TD.shape[1]))
    return total_TD, y_TD, roots_T


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, roots_T: Tensor, dtotal_TD: Tensor | None, *, unit_offset: bool
) -> Tensor:
    """The gradient of x, `dtotal` added."""
    dx_TD = torch.empty_like(x_TD)
    task = _RmsNormBackward(
        dy=dy_TD.data_ptr(),
        x=x_TD.data_ptr(),
        weight=weight_D.data_ptr(),
        roots=roots_T.data_ptr(),
        dtotal=None if dtotal_TD is None else dtotal_TD.data_ptr(),
        dx=dx_TD.data_ptr(),
        width=x_TD.shape[1],
        dtype=DTYPES[x_TD.dtype],
        path=cpu.path_number(),
        unit_offset=unit_offset,
    )
    in_shares(call("rms_norm_backward", task), x_TD.shape[0], smallest=_rows(x_TD.shape[1]))
    return dx_TD


@cache
def norms_as_torch_does(width: int) -> bool:
    """Whether the library sums the squares of rows of this width in the order of the torch that is installed."""
    if width > WIDEST_ROW:
        return False
    for rows in (1, 2, 67):
        x_TD = torch.arange(1, rows * width + 1, dtype=torch.float32, device="cpu").sqrt().view(rows, width)
        ones_D = torch.ones(width, dtype=torch.float32, device="cpu")
        roots_T1 = torch.rsqrt(x_TD.pow(2).mean(-1, keepdim=True) + 1e-5)
        if not torch.equal(rms_norm(x_TD, None, ones_D, eps=1e-5, unit_offset=False)[2], roots_T1[:, 0]):
            return False
    return True


def rotary(x_BHTD: Tensor, cosines: Tensor, sines: Tensor, *, back: bool, out_BHTD: Tensor) -> None:
    """Turn x into out, which may be x. Any strides will do but for the components', which is 1.

    The tables are [T, D] or [B, T, D].
    """
    batch, heads, tokens, head_dim = x_BHTD.shape
    x_batch, x_head, x_token, _ = x_BHTD.stride()
    out_batch, out_head, out_token, _ = out_BHTD.stride()
    task = _Rotary(
        x=x_BHTD.data_ptr(),
        out=out_BHTD.data_ptr(),
        cosines=cosines.data_ptr(),
        sines=sines.data_ptr(),
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        x_batch=x_batch,
        x_head=x_head,
        x_token=x_token,
        out_batch=out_batch,
        out_head=out_head,
        out_token=out_token,
        table_batch=tokens * head_dim if cosines.ndim == 3 else 0,
        back=back,
        dtype=DTYPES[x_BHTD.dtype],
        path=cpu.path_number(),
    )
    in_shares(call("rotary", task), batch * tokens, smallest=_rows(heads * head_dim))


def gated(gate: Tensor, up: Tensor, values: Tensor, *, y: Tensor) -> None:
    """values[bits of gate] * up of bfloat16, written to y, which may be gate or up."""
    task = _Gated(
        gate=gate.data_ptr(),
        up=up.data_ptr(),
        values=values.data_ptr(),
        y=y.data_ptr(),
        dtype=DTYPES[gate.dtype],
        path=cpu.path_number(),
    )
    in_shares(call("gated", task), gate.numel(), smallest=_SMALLEST_SHARE)


def gated_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    activation: str,
    tables: tuple[Tensor, Tensor] | None,
    out: tuple[Tensor, Tensor],
) -> None:
    """The gradients of gate and up, written to `out`, which may be gate and up.

    `tables` holds the activation's values and slopes by the bits of a bfloat16; for float32, where there are none, the
    activation is "silu" or "gelu_tanh".
    """
    task = _GatedBackward(
        dy=dy.data_ptr(),
        gate=gate.data_ptr(),
        up=up.data_ptr(),
        values=None if tables is None else tables[0].data_ptr(),
        slopes=None if tables is None else tables[1].data_ptr(),
        dgate=out[0].data_ptr(),
        dup=out[1].data_ptr(),
        activation=_ACTIVATIONS[activation] if tables is None else 0,
        dtype=DTYPES[gate.dtype],
        path=cpu.path_number(),
    )
    in_shares(call("gated_backward", task), gate.numel(), smallest=_SMALLEST_SHARE // 2)


def cross_entropy(logits_RV: Tensor, labels_R: Tensor, losses_R: Tensor, *, scale: float, has_gradient: bool) -> None:
    """Fill losses, and write the gradient times `scale` over the logits."""
    rows, vocabulary = logits_RV.shape
    task = _CrossEntropy(
        logits=logits_RV.data_ptr(),
        labels=labels_R.data_ptr(),
        losses=losses_R.data_ptr(),
        vocabulary=vocabulary,
        scale=scale,
        has_gradient=has_gradient,
        dtype=DTYPES[logits_RV.dtype],
        path=cpu.path_number(),
    )
    in_shares(call("cross_entropy", task), rows, smallest=_rows(vocabulary))


def _rows(width: int) -> int:
    """The rows of one share at least."""
    return max(1, _SMALLEST_SHARE // max(1, width))
