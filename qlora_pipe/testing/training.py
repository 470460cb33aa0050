"""How a model trains: block by block as in one piece, every adapter reached, packed as alone."""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from qlora_pipe.config import Recompute
from qlora_pipe.data.batches import Batch, collate
from qlora_pipe.data.encode import Sample
from qlora_pipe.nn.adapt import adapters_of
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.nn.packing import Packing
from qlora_pipe.testing.subject import FIRST_TEXT_ID, LeftOut, Subject
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.loss import summed_loss
from qlora_pipe.train.recompute import RecomputePlan

_LENGTHS = (7, 4, 9)
_ROWS = ((4, 3), (6,), (2, 5))
_MODES: tuple[Recompute, ...] = ("none", "all")


def check_training(subject: Subject) -> None:
    """Block by block, kept or computed again, loss and gradients are those of one plain pass."""
    batch = _batch(subject)

    def plain(model: LoadedModel) -> Tensor:
        loss = summed_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    wanted_loss, wanted = _outcome(subject, plain)
    for mode in _MODES:
        passes = "kept" if mode == "none" else "computed again"

        def by_blocks(model: LoadedModel, mode: Recompute = mode) -> Tensor:
            return BlockwisePass(model, recompute=RecomputePlan(mode)).run([batch], divisor=1.0)[0]

        loss, found = _outcome(subject, by_blocks)
        subject.require_close(
            loss,
            wanted_loss,
            f"its loss by blocks that are {passes} is not that of the whole model: all that is computed lies in embed,"
            " the blocks, finish and head, and a block computes the same each time.",
        )
        for name, gradient in wanted.items():
            subject.require_close(
                found[name],
                gradient,
                f"by blocks that are {passes} the gradient of {name} is not that of the whole model: a block gets all"
                " that it needs from the state and from what `embed` gives, and changes neither.",
            )


def check_gradients(subject: Subject) -> None:
    """Every adapter is trained."""
    _, found = _outcome(
        subject,
        lambda model: BlockwisePass(model, recompute=RecomputePlan("all")).run([_batch(subject)], divisor=1.0)[0],
    )
    for name, gradient in found.items():
        subject.require(
            bool(gradient.isfinite().all()) and bool(gradient.any()),
            f"{name} gets no gradient, or one that is not finite: the layer is not called, or its output is detached.",
        )


def check_packing(subject: Subject) -> None:
    """Samples that share a row give what they give alone."""
    if not subject.architecture.packs:
        raise LeftOut("it does not say that it packs")
    module = cast(CausalModel, subject.loaded(subject.checkpoint).module)
    width = max(sum(row) for row in _ROWS) + 1
    ids = torch.full((len(_ROWS), width), FIRST_TEXT_ID)
    draws = torch.Generator().manual_seed(1)
    for row, lengths in enumerate(_ROWS):
        size = sum(lengths)
        ids[row, :size] = torch.randint(FIRST_TEXT_ID, subject.config["vocab_size"], (size,), generator=draws)
    with torch.no_grad():
        packed = module.hidden(ids, packing=Packing.of(_ROWS, width=width))
        for row, lengths in enumerate(_ROWS):
            ends = np.cumsum(lengths).tolist()
            for start, end in zip([0, *ends], ends, strict=False):
                subject.require_close(
                    packed[row, start:end],
                    module.hidden(ids[row : row + 1, start:end])[0],
                    f"it says that it packs, and a sample behind {start} tokens of others gives other hidden states"
                    " than alone: attention and positions must go by the packing.",
                )


def _outcome(subject: Subject, work: Callable[[LoadedModel], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of a model's adapters; zero where there is none."""
    torch.manual_seed(3)
    model = subject.adapted()
    loss = work(model)
    parts = {
        f"{path}.{name}": parameter
        for path, layer in adapters_of(model.module).items()
        for name, parameter in (("lora_a", layer.lora_a), ("lora_b", layer.lora_b))
    }
    return loss, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parts.items()}


def _batch(subject: Subject) -> Batch:
    """Rows of several lengths, of which a part is trained."""
    draws = np.random.default_rng(5)
    last = subject.config["vocab_size"]

    def ids(length: int) -> "np.typing.NDArray[np.int32]":
        return draws.integers(FIRST_TEXT_ID, last, length).astype(np.int32)

    samples = [
        Sample(
            ids=ids(length),
            trained=np.arange(length) > length // 3,
            origin=f"row {number}",
            source=None if subject.is_causal else ids(length + 2),
        )
        for number, length in enumerate(_LENGTHS)
    ]
    return collate([[sample] for sample in samples])
