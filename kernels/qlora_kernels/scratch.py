"""Memory that dense weights are written into: none is allocated for them in the middle of a step, and none is kept."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qlora_kernels.dispatch import dequantize
from qlora_kernels.quantized import QuantizedTensor

# Elements: every weight begins on a multiple of 64 bytes, whatever its type.
_ALIGNMENT = 64


class Scratch:
    """One buffer per device and type, as large as the largest use of it so far.

    A dense weight is good until the next one is asked for. Within `hold()` all of them stay, each made once: for a
    block whose weights are used several times in a row. One thread at a time works with a Scratch.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._held: dict[tuple[int, torch.dtype], Tensor] | None = None
        self._used: dict[tuple[torch.device, torch.dtype], int] = {}

    def dense(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The dense weight [*weight.shape] in `dtype` on `device`; never to be written to."""
        if self._held is None:
            self._used.clear()
            return dequantize(weight, dtype, out=self._room(weight, dtype, device))
        # Weights whose codes lie at one address are one weight: within a block nothing is moved.
        key = weight.codes.data_ptr(), dtype
        if key not in self._held:
            self._held[key] = dequantize(weight, dtype, out=self._room(weight, dtype, device))
        return self._held[key]

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every weight made in this block until its end; a hold inside a hold is the outer one."""
        if self._held is not None:
            yield
            return
        self._held = {}
        self._used.clear()
        try:
            yield
        finally:
            self._held = None
            for (device, dtype), used in self._used.items():
                self._reserve(used, dtype, device)

    def _room(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        start = self._used.get((device, dtype), 0)
        count = math.prod(weight.shape)
        self._used[device, dtype] = end = start + math.ceil(count / _ALIGNMENT) * _ALIGNMENT
        if self._held is None or not self._held:
            # Nothing lies in the buffer that is still needed.
            self._reserve(end, dtype, device)
        buffer = self._buffers[device, dtype]
        if end > buffer.numel():
            # The first visit of a block that is larger than all before it; the buffer grows when the visit ends.
            return torch.empty(weight.shape, dtype=dtype, device=device)
        return buffer[start : start + count].view(weight.shape)

    def _reserve(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        buffer = self._buffers.get((device, dtype))
        if buffer is None or buffer.numel() < count:
            # The old one is let go of first.
            self._buffers.pop((device, dtype), None)
            del buffer
            self._buffers[device, dtype] = torch.empty(count, dtype=dtype, device=device)
