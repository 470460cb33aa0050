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
from qlora_pipe.lanes import sent
from qlora_pipe.nn.linear import LoraLinear, share_scratch
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.train.loss import loss_of_hidden
from qlora_pipe.train.recompute import RecomputePlan
from qlora_pipe.train.shelf import Shelf, Shelved

_SEEDS = 2**62


class _Visit(NamedTuple):
    """What is kept of a batch's way through a block: its input and, unless it is computed again, its output."""

    before: Tensor | Shelved
    after: Tensor | None


class BlockwisePass:
    """Runs batches forward and backward through a model, and adds their gradients to the adapters'.

    With `offload`, the inputs of blocks that are computed again wait in the host's memory.
    """

    def __init__(self, model: LoadedModel, *, recompute: RecomputePlan, offload: bool = False) -> None:
        self._model = model
        self._shelf = Shelf(model.device) if offload else None
        self._recompute = recompute
        self._blocks = list(model.causal.blocks)
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
        model, device = self._model.causal, self._model.device
        # One draw for a batch: the masks do not depend on how often, or in which order, blocks run.
        drops = self._drops
        seeds = [int(torch.randint(_SEEDS, ())) if drops else 0 for _ in batches]
        with torch.no_grad():
            begun = [model.embed(sent(batch.ids, device), packing=batch.packing_on(device)) for batch in batches]
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
        losses = []
        for each, batch in enumerate(batches):
            loss, states[each] = self._loss(states[each], batch, divisor=divisor, loss_scale=loss_scale)
            losses.append(loss)
        for number in reversed(range(len(self._blocks))):
            visits = kept.pop()
            self._fetch(visits)
            self._fetch(kept[-1] if kept else [])
            # So is one that the second forward and dX both use.
            with self._scratch.hold() if len(batches) > 1 or visits[0].after is None else nullcontext():
                for each, visit in enumerate(visits):
                    states[each] = self._backward(number, visit, states[each], told[each], seeds[each])
        return losses

    def _forward(self, number: int, state: Tensor, told: Any, seed: int, *, keep: bool) -> tuple[_Visit, Tensor]:
        with self._seeded(number, seed):
            if not keep:
                with torch.no_grad():
                    after: Tensor = self._blocks[number](state, told)
                return _Visit(state if self._shelf is None else self._shelf.put(state), None), after
            # Nothing before the first block is trained.
            before = state.detach().requires_grad_(number > 0)
            after = self._blocks[number](before, told)
            return _Visit(before, after), after.detach()

    def _fetch(self, visits: Sequence[_Visit]) -> None:
        """Begin to bring back what was set aside."""
        for before, _ in visits:
            if isinstance(before, Shelved):
                assert self._shelf is not None
                self._shelf.fetch(before)

    def _loss(self, state: Tensor, batch: Batch, *, divisor: float, loss_scale: float) -> tuple[Tensor, Tensor]:
        """A batch's loss, and the gradient of the state after the last block."""
        state = state.detach().requires_grad_()
        loss = loss_of_hidden(self._model, self._model.causal.finish(state), batch) / divisor
        (loss * loss_scale).backward()  # type: ignore[no-untyped-call]
        assert state.grad is not None
        return loss.detach(), state.grad

    def _backward(self, number: int, visit: _Visit, gradient: Tensor, told: Any, seed: int) -> Tensor:
        """Give the gradient of the block's input; before the first block it is what came, and no longer of use."""
        before, after = visit
        if isinstance(before, Shelved):
            assert self._shelf is not None
            before = self._shelf.take(before)
        # A block that is computed again enters by itself, and one that was kept does not.
        self._model.residency.enter(number)
        if after is None:
            before = before.detach().requires_grad_(number > 0)
            with self._seeded(number, seed):
                after = self._blocks[number](before, told)
        if after.requires_grad:
            torch.autograd.backward(after, gradient)
        return gradient if before.grad is None else before.grad

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
