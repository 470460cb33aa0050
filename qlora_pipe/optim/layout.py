"""How both moments of the parameters on a page share its bytes."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from qlora_kernels.adamw import BLOCK, SIGNED_ZERO, Moments8, Moments32

# Pages are cut between groups of so many parameters: every field then begins at a multiple of 16 bytes, as the kernels'
# widest loads want it.
GROUP: Final = 4 * BLOCK
# A budget can be met to about this share of all, however small that is.
_LEAST_PAGES: Final = 40


class Field(NamedTuple):
    """One value per so many parameters, and what it is before the first step."""

    name: str
    dtype: torch.dtype
    per: int
    blank: int = 0


_WIDE = (Field("exp_avg", torch.float32, 1), Field("exp_avg_sq", torch.float32, 1))
_NARROW = (
    Field("exp_avg_codes", torch.uint8, 1, SIGNED_ZERO),
    Field("exp_avg_sq_codes", torch.uint8, 1),
    Field("exp_avg_absmax", torch.float32, BLOCK),
    Field("exp_avg_sq_absmax", torch.float32, BLOCK),
)


class Layout(NamedTuple):
    """A page: the fields one after the other, each with room for `numbers` parameters, a multiple of GROUP."""

    bits: int
    numbers: int

    @property
    def fields(self) -> Sequence[Field]:
        """What there is of each parameter or block, by the names under which checkpoints hold it."""
        return fields_of(self.bits)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.numbers // GROUP * bytes_per_group(self.bits)

    def parts(self, page: Tensor, numbers: int) -> list[Tensor]:
        """The fields of the first `numbers` parameters of a page, as views of its bytes (uint8)."""
        found, start = [], 0
        for field in self.fields:
            stop = start + self.numbers // field.per * field.dtype.itemsize
            found.append(page[start:stop].view(field.dtype)[: numbers // field.per])
            start = stop
        return found

    def moments(self, page: Tensor, numbers: int) -> Moments32 | Moments8:
        """The same for the kernel."""
        parts = self.parts(page, numbers)
        return Moments32(*parts) if self.bits == 32 else Moments8(*parts)


def fields_of(bits: int) -> Sequence[Field]:
    """The fields of moments in 32 or in 8 bits."""
    return _WIDE if bits == 32 else _NARROW


def bytes_per_group(bits: int) -> int:
    """Bytes of all fields of GROUP parameters."""
    return sum(GROUP // field.per * field.dtype.itemsize for field in fields_of(bits))


def paged_layout(bits: int, numbers: int, *, largest_page: int) -> Layout:
    """Cut the moments of so many parameters into pages that nearly fill a power of two in bytes."""
    group = bytes_per_group(bits)
    wanted = min(largest_page, numbers // GROUP * group // _LEAST_PAGES)
    # A power of two that holds one group at the least.
    size = 1 << max(wanted.bit_length() - 1, (group - 1).bit_length())
    return Layout(bits, size // group * GROUP)
