"""AdamW whose states take as much of the device as they are given, with the same bits whatever that is.

Parameters and gradients lie end to end in two flat tensors, so that a page of states belongs to one slice of each, and
a step needs no memory of its own.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from qlora_kernels.adamw import BLOCK, adamw_step, coefficients
from qlora_pipe.optim.layout import GROUP, Layout, bytes_per_group, fields_of, paged_layout
from qlora_pipe.optim.pager import Moved, Pager
from qlora_pipe.optim.storage import Storage


class PagedAdamW:
    """AdamW over named float32 parameters of one device, moments in 32 or in 8 bits.

    The parameters become views of one flat tensor, and so do their gradients, which are there from the start, are added
    to by backward and zeroed by `zero_grad`: they must not be replaced. A parameter whose gradient stays zero moves by
    its moments and the weight decay. States take memory when the first step is due. How many updates were done is for
    the caller to know.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
        bits: Literal[32, 8] = 32,
        storage: Storage,
    ) -> None:
        devices = {parameter.device for parameter in parameters.values()}
        assert len(devices) == 1, f"parameters on {devices}"
        assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
        self._device = devices.pop()
        self._betas, self._weight_decay, self._eps = betas, weight_decay, eps
        self._bits, self._storage = bits, storage
        self._parameters = dict(parameters)
        self._spans = _spans(parameters)
        self._numbers: int = -(-max(span.stop for span in self._spans.values()) // GROUP) * GROUP
        self._flat = torch.zeros(self._numbers, device=self._device)
        self._gradient = torch.zeros(self._numbers, device=self._device)
        self._gradients: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            span = self._spans[name]
            view = self._flat[span].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self._gradients[name] = self._gradient[span].view(parameter.shape)
        self._layout: Layout | None = None
        self._pager: Pager | None = None
        self._waiting: dict[str, Tensor] = {}

    @property
    def resident_bytes(self) -> int:
        """Memory that the states take on the device."""
        return self._pager.resident_bytes if self._pager is not None else 0

    @property
    def state_bytes(self) -> int:
        """Bytes of all states."""
        return self._numbers // GROUP * bytes_per_group(self._bits)

    def step(self, *, lr: float, number: int, factor: Tensor) -> Moved:
        """Do update `number`, counted from 1, with the gradients times `factor`, one float32 number on the device.

        A factor of NaN skips the update: nothing changes. Gives what was moved; nothing here waits for the device.
        """
        for name, parameter in self._parameters.items():
            assert parameter.grad is self._gradients[name], f"the gradient of {name} was replaced"
        layout, pager = self._opened()
        before = pager.moved
        by = coefficients(lr=lr, betas=self._betas, eps=self._eps, weight_decay=self._weight_decay, number=number)
        for index, page in pager.visit():
            span = self._span(layout, index)
            moments = layout.moments(page, span.stop - span.start)
            adamw_step(self._flat[span], self._gradient[span], moments, factor_1=factor, by=by)
        return pager.moved.since(before)

    def zero_grad(self) -> None:
        """Make all gradients zero, in place."""
        self._gradient.zero_()

    def saved(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the states of one parameter on the CPU, by the keys that `expected` names."""
        for key, (shape, dtype) in self.expected(name).items():
            if self._pager is None:
                yield key, self._waiting[key]
                continue
            found = torch.empty(shape, dtype=dtype)
            for part, place in self._pieces(key, name, found.view(-1)):
                part.copy_(place)
            yield key, found

    def expected(self, name: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """The keys of one parameter's states, `exp_avg/NAME` and so on, with their shapes and types."""
        shape = self._parameters[name].shape
        blocks = torch.Size([-(-shape.numel() // BLOCK)])
        return {
            f"{field.name}/{name}": (shape if field.per == 1 else blocks, field.dtype)
            for field in fields_of(self._bits)
        }

    def load(self, states: Mapping[str, Tensor]) -> None:
        """Take over the states of all parameters, from the keys that `expected` names."""
        self._waiting = {key: states[key] for name in self._parameters for key in self.expected(name)}
        if self._pager is not None:
            self._fill()

    def _opened(self) -> tuple[Layout, Pager]:
        """The states, made now if this is the first step of the process."""
        if self._layout is None or self._pager is None:
            budget = self._storage.budget()
            if budget is None or budget >= self.state_bytes:
                self._layout, resident = Layout(self._bits, self._numbers), 1
            else:
                self._layout = paged_layout(self._bits, self._numbers, largest_page=self._storage.largest_page)
                resident = max(1, budget // self._layout.page_bytes)
            pages = -(-self._numbers // self._layout.numbers)
            self._pager = Pager(
                pages=pages,
                page_bytes=self._layout.page_bytes,
                resident=min(resident, pages),
                device=self._device,
                lanes=self._storage.lanes,
                backing=self._storage.backing,
            )
            self._fill()
        return self._layout, self._pager

    def _fill(self) -> None:
        """Write the states that wait to be taken over, or those of a beginning, to their pages."""
        assert self._layout is not None
        assert self._pager is not None
        for index in range(self._pager.pages):
            parts = self._layout.parts(self._pager.page(index), self._layout.numbers)
            for field, part in zip(self._layout.fields, parts, strict=True):
                # Fresh pages are zeros, and to write them would take the time of a step.
                if field.blank:
                    part.fill_(field.blank)
        for name in self._parameters if self._waiting else ():
            for key in self.expected(name):
                for part, place in self._pieces(key, name, self._waiting[key].view(-1)):
                    place.copy_(part)
        self._waiting = {}

    def _pieces(self, key: str, name: str, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield slices of one parameter's `values`, each with the place on a page that belongs to it."""
        assert self._layout is not None
        assert self._pager is not None
        names = [field.name for field in self._layout.fields]
        which = names.index(key.partition("/")[0])
        per = self._layout.fields[which].per
        first, last = self._spans[name].start, self._spans[name].stop
        for index in range(first // self._layout.numbers, (last - 1) // self._layout.numbers + 1):
            span = self._span(self._layout, index)
            start, stop = max(first, span.start), min(last, span.stop)
            part = self._layout.parts(self._pager.page(index), span.stop - span.start)[which]
            yield (
                values[(start - first) // per : -(-(stop - first) // per)],
                part[(start - span.start) // per : -(-(stop - span.start) // per)],
            )

    def _span(self, layout: Layout, index: int) -> slice:
        start = index * layout.numbers
        return slice(start, min(start + layout.numbers, self._numbers))


def _spans(parameters: Mapping[str, nn.Parameter]) -> dict[str, slice]:
    """Where each parameter lies; it begins with a block, so that its 8-bit states are its own and its bytes aligned."""
    spans, end = {}, 0
    for name, parameter in parameters.items():
        spans[name] = slice(end, end + parameter.numel())
        end += -(-parameter.numel() // BLOCK) * BLOCK
    return spans
