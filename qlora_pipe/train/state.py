"""Everything a run is at one moment, and how it becomes tensors and back.

What is left out here is what makes a resumed run differ: so the state holds the adapters, the optimizer's moments,
gradients of an unfinished window, every generator, the place in the data, and counters.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pipe.errors import DataError
from qlora_pipe.optim.paged_adamw import PagedAdamW
from qlora_pipe.train.scaler import LossScale


@dataclass
class Progress:
    """The counters of a run: all that is not a tensor."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Rows taken from the stream, a sample each or several: the epoch, and the place in it, follow."""
    micro_step: int = 0
    """Forward passes done of the window that is open."""
    loss_sum: float = 0.0
    """Loss of the open window so far, already divided by the window's trained tokens."""
    tokens: int = 0
    """Real tokens seen so far, padding left out."""
    seconds: float = 0.0
    """Time of the open window so far."""
    updates: int = 0
    """Steps that changed the weights: a non-finite one does not."""
    eval_loss_start: float | None = None
    eval_loss: float | None = None
    pending: dict[str, Any] | None = None
    """The metrics of a step whose evaluation has not ended."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl: what stands behind it was not reported saved."""
    skipped: list[int] = field(default_factory=list)
    """Steps skipped because they were not finite."""
    scale: float = 1.0
    clean_steps: int = 0


class TrainingState:
    """The parameters, the optimizer and the counters that move together."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: PagedAdamW, scale: LossScale) -> None:
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self.scale = scale
        self.progress = Progress()
        self.on_gpu = any(parameter.is_cuda for parameter in self.parameters.values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the state by name, on the CPU, in a fixed order."""
        for name, parameter in self.parameters.items():
            yield f"parameter/{name}", parameter.detach().cpu()
            if self.progress.updates:
                yield from self.optimizer.saved(name)
            if self.progress.micro_step:
                yield f"gradient/{name}", _gradient(parameter).cpu()
        yield "generator/cpu", torch.get_rng_state()
        if self.on_gpu:
            yield "generator/cuda", torch.cuda.get_rng_state()

    def restore(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Take over a saved state; DataError where a tensor of it is missing or of another shape."""

        def take(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            if key not in tensors or tensors[key].shape != shape or tensors[key].dtype != dtype:
                raise DataError(f"the checkpoint's state does not fit this run: {key} is missing or of another shape.")
            return tensors[key]

        self.progress = progress
        self.scale.value, self.scale.clean_steps = progress.scale, progress.clean_steps
        self.optimizer.zero_grad()
        states: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            kind = (parameter.shape, parameter.dtype)
            with torch.no_grad():
                parameter.copy_(take(f"parameter/{name}", *kind))
            if progress.updates:
                states |= {key: take(key, *kind) for key, kind in self.optimizer.expected(name).items()}
            if progress.micro_step:
                _gradient(parameter).copy_(take(f"gradient/{name}", *kind))
        if states:
            self.optimizer.load(states)
        generator = torch.get_rng_state()
        torch.set_rng_state(take("generator/cpu", generator.shape, generator.dtype))
        if self.on_gpu:
            generator = torch.cuda.get_rng_state()
            torch.cuda.set_rng_state(take("generator/cuda", generator.shape, generator.dtype))


def _gradient(parameter: nn.Parameter) -> Tensor:
    # The optimizer gives every parameter its gradient before there is any.
    assert parameter.grad is not None
    return parameter.grad
