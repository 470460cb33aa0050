"""Where every byte of a store goes: which tensors a shard holds, in which order, and how long its JSON fillers are.

The tensors of a block lie together and start on a page, so that one layer is one copy; packed codes start on a
multiple of 64 bytes, so that a GPU may read them in vectors. safetensors forbids holes, so the gaps are filled with
what may grow: the trailing spaces of the quant_state JSON.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from qlora_formats.quant_state import QuantState, parts_of, state_name
from qlora_formats.tensorfile import TensorPlan

PAGE_BYTES = 4096
CODES_ALIGNMENT = 64
NESTED_BLOCK_SIZE = 256

_STATE_BYTES = 256


class WeightPlan(NamedTuple):
    """One weight of the model. `dtype` is the source's; `block` the prefix of its group ("model.layers.0."), if any."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    block: str | None
    quantized: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StorePlan:
    """All that decides the bytes of a store, but for the values. Make one with `StorePlan.of`."""

    weights: tuple[WeightPlan, ...]
    kind: str
    block_size: int
    double_quant: bool
    skip_modules: tuple[str, ...]

    @classmethod
    def of(
        cls,
        tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
        *,
        block_of: Callable[[str], str | None],
        is_quantized: Callable[[str], bool],
        kind: str,
        block_size: int,
        double_quant: bool,
        skip_modules: Iterable[str],
    ) -> Self:
        """Plan a store of a model's tensors, whatever the order in which the source holds them.

        `block_of` gives the prefix of the group that a weight belongs to, with its last dot, or None;
        `skip_modules` are the module names that a reader must not expect in 4 bits.
        """
        ordered = sorted(tensors, key=lambda tensor: _natural(tensor[0]))
        return cls(
            weights=tuple(
                WeightPlan(name, dtype, shape, block_of(name), is_quantized(name)) for name, dtype, shape in ordered
            ),
            kind=kind,
            block_size=block_size,
            double_quant=double_quant,
            skip_modules=tuple(skip_modules),
        )

    def state(self, weight: WeightPlan) -> QuantState:
        """What the JSON of a quantised weight will say, but for the offset."""
        nested = NESTED_BLOCK_SIZE if self.double_quant else None
        return QuantState(self.kind, self.block_size, weight.dtype, weight.shape, nested)


class Piece(NamedTuple):
    """One tensor of a shard: `part` of the weight `weight`, a field of StoredWeight, "state" or "tensor"."""

    plan: TensorPlan
    weight: str
    part: str


def place(plan: StorePlan, *, shard_bytes: int) -> list[list[Piece]]:
    """The shards of a store, each at most `shard_bytes` long, if no single group of tensors is longer."""
    shards: list[list[Piece]] = [[]]
    reached = 0
    for group in _groups(plan):
        n_bytes = sum(piece.plan.n_bytes for piece in group)
        # Only groups that cannot be padded start anywhere but on a page; they come last.
        misaligned = reached % max(piece.plan.dtype.itemsize for piece in group)
        if shards[-1] and (misaligned or reached + n_bytes > shard_bytes):
            shards.append([])
            reached = 0
        shards[-1].extend(group)
        reached += n_bytes
    return shards


def _groups(plan: StorePlan) -> Iterator[list[Piece]]:
    blocks: dict[str, list[WeightPlan]] = {}
    rest = []
    for weight in plan.weights:
        if weight.block is not None or weight.quantized:
            blocks.setdefault(weight.block or weight.name, []).append(weight)
        else:
            rest.append(weight)
    padded = [group for group in blocks.values() if any(weight.quantized for weight in group)]
    for group in padded:
        yield _padded(group, plan)
    for group in blocks.values():
        if group not in padded:
            yield _by_item_size(_kept(weight) for weight in group)
    for piece in _by_item_size(_kept(weight) for weight in rest):
        yield [piece]


def _padded(group: Sequence[WeightPlan], plan: StorePlan) -> list[Piece]:
    states = {weight.name: plan.state(weight) for weight in group if weight.quantized}
    parts = {name: parts_of(name, state) for name, state in states.items()}
    pieces: list[Piece] = []
    reached = 0

    def add(piece: Piece) -> None:
        nonlocal reached
        pieces.append(piece)
        reached += piece.plan.n_bytes

    def add_state(name: str, alignment: int) -> None:
        shortest = max(_STATE_BYTES, states[name].longest_json)
        size = _round_up(reached + shortest, alignment) - reached
        add(Piece(TensorPlan(state_name(name, plan.kind), torch.uint8, (size,)), name, "state"))

    # Codes come first, those that need nothing behind them foremost, so that fillers are needed only for odd widths.
    # The last filler is kept for the end of the block; if every weight is odd, what follows the last one starts right
    # behind it, and on a multiple of 4 if any weight's length allows it.
    codes = sorted(
        (part.codes for part in parts.values()),
        key=lambda plan: (plan.n_bytes % CODES_ALIGNMENT != 0, plan.n_bytes % 4 == 0),
    )
    waiting = [code.name for code in codes]
    for code in codes:
        add(Piece(code, code.name, "codes"))
        if reached % CODES_ALIGNMENT and len(waiting) > 1:
            waiting.remove(code.name)
            add_state(code.name, CODES_ALIGNMENT)
    small = [
        Piece(part, name, field)
        for name, weight_parts in parts.items()
        for field, part in weight_parts._asdict().items()
        if field != "codes" and part is not None
    ]
    for piece in _by_item_size([*small, *(_kept(weight) for weight in group if not weight.quantized)]):
        add(piece)
    for name in waiting:
        add_state(name, PAGE_BYTES if name == waiting[-1] else 1)
    return pieces


def _kept(weight: WeightPlan) -> Piece:
    return Piece(TensorPlan(weight.name, weight.dtype, weight.shape), weight.name, "tensor")


def _by_item_size(pieces: Iterable[Piece]) -> list[Piece]:
    return sorted(pieces, key=lambda piece: -piece.plan.dtype.itemsize)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _natural(name: str) -> list[tuple[int, str]]:
    # "layers.10" comes after "layers.9".
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]
