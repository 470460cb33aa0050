"""Forward and backward block by block: what is kept in between is chosen, not what autograd happens to save.

Of a block either everything is kept that its backward needs, or its input alone, from which it is computed again
(Chen et al., 2016, arXiv 1604.06174): the same arithmetic, so the same bits. A block's dense weights are made once for
all that a visit does: in backward for the second forward and for dX together. Several batches may go through a block
before the next block begins, so that weights which have to be brought from afar are brought once for all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_pipe.architecture import matches
from qlora_pipe.data.batches import Batch
from qlora_pipe.errors import ConfigError
from qlora_pipe.nn.language import State, state_of, tensors_of
from qlora_pipe.nn.linear import LoraLinear, share_scratch
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.train.loss import loss_of_hidden
from qlora_pipe.train.recompute import RecomputePlan
from qlora_pipe.train.shelf import Shelf, Shelved

_SEEDS = 2**62


Gradients = Sequence[Tensor | None]
"""Of a state's tensors; None where one has no part in the loss."""


class _Visit(NamedTuple):
    """What is kept of a batch's way through a block: its input and, unless it is computed again, its output."""

    before: tuple[Tensor | Shelved, ...]
    after: tuple[Tensor, ...] | None


class BlockwisePass:
    """Runs batches forward and backward through a model, and adds their gradients to the adapters'.

    With `offload`, the inputs of blocks that are computed again wait in the host's memory.
    """

    def __init__(self, model: LoadedModel, *, recompute: RecomputePlan, offload: bool = False) -> None:
        self._model = model
        self._shelf = Shelf(model.device) if offload else None
        self._recompute = recompute
        self._blocks = list(model.language.blocks)
        self._scratch = share_scratch(model.module)
        self._adapters = [[part for part in block.modules() if isinstance(part, LoraLinear)] for block in self._blocks]
        self._require_all_reached()

    @property
    def whole_windows(self) -> bool:
        """Whether to run all batches of a window at once: where bringing a block's weights in is what takes time."""
        return self._model.residency.prefers_layer_major

    def run(self, batches: Sequence[Batch], *, divisor: float, loss_scale: float = 1.0) -> list[Tensor]:
        """The summed loss of each batch over `divisor`, float32 scalars; gradients are those of `loss_scale` times it.

        All batches go through a block before the next block begins; gradients add up in the order of the batches, with
        the bits that one `run` for each of them would give.
        """
        model, device = self._model.language, self._model.device
        # One draw for a batch: the masks do not depend on how often, or in which order, blocks run.
        drops = self._drops
        seeds = [int(torch.randint(_SEEDS, ())) if drops else 0 for _ in batches]
        with torch.no_grad():
            begun = [model.begin(batch.inputs_on(device)) for batch in batches]
        states, told = [state for state, _ in begun], [told for _, told in begun]
        kept: list[list[_Visit]] = []
        keeps = self._recompute.choose(self._blocks, states, told)
        for number in range(len(self._blocks)):
            kept.append([])
            # A weight used by several batches is made dense once for all of them.
            with self._scratch.hold() if len(batches) > 1 else nullcontext():
                for each, seed in enumerate(seeds):
                    visit, states[each] = self._forward(number, states[each], told[each], seed, keep=keeps(number))
                    kept[-1].append(visit)
        losses: list[Tensor] = []
        gradients: list[Gradients] = []
        for state, batch in zip(states, batches, strict=True):
            loss, gradient = self._loss(state, batch, divisor=divisor, loss_scale=loss_scale)
            losses.append(loss)
            gradients.append(gradient)
        # Nobody needs the last states any more.
        states.clear()
        for number in reversed(range(len(self._blocks))):
            visits = kept.pop()
            self._fetch(visits)
            self._fetch(kept[-1] if kept else [])
            # So is one that the second forward and dX both use.
            with self._scratch.hold() if len(batches) > 1 or visits[0].after is None else nullcontext():
                for each, visit in enumerate(visits):
                    gradients[each] = self._backward(number, visit, gradients[each], told[each], seeds[each])
        return losses

    def _forward(self, number: int, state: State, told: Any, seed: int, *, keep: bool) -> tuple[_Visit, State]:
        with self._seeded(number, seed):
            if not keep:
                with torch.no_grad():
                    after: State = self._blocks[number](state, told)
                return _Visit(self._set_aside(state, after), None), after
            # Nothing before the first block is trained.
            before = [part.detach().requires_grad_(number > 0) for part in tensors_of(state)]
            after = self._blocks[number](state_of(before), told)
            return _Visit(tuple(before), tensors_of(after)), state_of([part.detach() for part in tensors_of(after)])

    def _set_aside(self, state: State, after: State) -> tuple[Tensor | Shelved, ...]:
        """What to keep of a state: its tensors, or what stands for those that the next block does not need."""
        if self._shelf is None:
            return tensors_of(state)
        needed = {id(part) for part in tensors_of(after)}
        return tuple(part if id(part) in needed else self._shelf.put(part) for part in tensors_of(state))

    def _fetch(self, visits: Sequence[_Visit]) -> None:
        """Begin to bring back what was set aside."""
        for part in (part for before, _ in visits for part in before):
            if isinstance(part, Shelved):
                assert self._shelf is not None
                self._shelf.fetch(part)

    def _loss(self, state: State, batch: Batch, *, divisor: float, loss_scale: float) -> tuple[Tensor, Gradients]:
        """A batch's loss, and the gradient of the state after the last block."""
        parts = [part.detach().requires_grad_() for part in tensors_of(state)]
        loss = loss_of_hidden(self._model, self._model.language.finish(state_of(parts)), batch) / divisor
        (loss * loss_scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), [part.grad for part in parts]

    def _backward(self, number: int, visit: _Visit, gradient: Gradients, told: Any, seed: int) -> Gradients:
        """Give the gradient of the block's input; there is none before the first block."""
        before = [self._taken(part) for part in visit.before]
        after = visit.after
        # A block that is computed again enters by itself, and one that was kept does not.
        self._model.residency.enter(number)
        if after is None:
            before = [part.detach().requires_grad_(number > 0) for part in before]
            with self._seeded(number, seed):
                after = tensors_of(self._blocks[number](state_of(before), told))
        reached = [
            (part, given)
            for part, given in zip(after, gradient, strict=True)
            if part.requires_grad and given is not None
        ]
        if reached:
            outputs, given = zip(*reached, strict=True)
            torch.autograd.backward(outputs, given)
        return [part.grad for part in before]

    def _taken(self, part: Tensor | Shelved) -> Tensor:
        if not isinstance(part, Shelved):
            return part
        assert self._shelf is not None
        return self._shelf.take(part)

    @contextmanager
    def _seeded(self, number: int, seed: int) -> Iterator[None]:
        """Give every adapter of a block the seed of its masks, which follows from the batch's and its place."""
        first = sum(map(len, self._adapters[:number]))
        for place, layer in enumerate(self._adapters[number], start=first):
            layer.seed = _mixed(seed, place)
        yield
        for layer in self._adapters[number]:
            layer.seed = None

    @property
    def _drops(self) -> bool:
        return any(layer.dropout > 0 for layers in self._adapters for layer in layers)

    def _require_all_reached(self) -> None:
        """Raise ConfigError where an adapter would silently not be trained (the head's own gradient is autograd's)."""
        reached = {id(layer) for layers in self._adapters for layer in layers}
        heads = self._model.architecture.keep_16bit
        for path, part in self._model.module.named_modules():
            if isinstance(part, LoraLinear) and id(part) not in reached and not matches(path, heads):
                raise ConfigError(
                    f"the adapter on {path} lies outside of the model's blocks, where it cannot be trained."
                )


def _mixed(seed: int, place: int) -> int:
    """Spread seeds and places over all seeds (the mixing of splitmix64): neighbours get unlike masks."""
    mixed = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) % _SEEDS
