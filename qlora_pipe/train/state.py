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
from qlora_pipe.train.scaler import LossScale

_MOMENTS = ("exp_avg", "exp_avg_sq")


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

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW, scale: LossScale) -> None:
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self.scale = scale
        self.progress = Progress()
        self.on_gpu = any(parameter.is_cuda for parameter in self.parameters.values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the state by name, on the CPU, in a fixed order."""
        for name, parameter in self.parameters.items():
            yield f"parameter/{name}", parameter.detach().cpu()
            moments = self.optimizer.state[parameter]
            for moment in _MOMENTS:
                if moment in moments:
                    yield f"{moment}/{name}", moments[moment].cpu()
            if self.progress.micro_step and parameter.grad is not None:
                yield f"gradient/{name}", parameter.grad.cpu()
        yield "generator/cpu", torch.get_rng_state()
        if self.on_gpu:
            yield "generator/cuda", torch.cuda.get_rng_state()

    def restore(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Take over a saved state; DataError where a tensor of it is missing or of another shape."""

        def take(key: str, like: Tensor) -> Tensor:
            if key not in tensors or tensors[key].shape != like.shape:
                raise DataError(f"the checkpoint's state does not fit this run: {key} is missing or of another shape.")
            return tensors[key].to(device=like.device, dtype=like.dtype, copy=True)

        self.progress = progress
        self.scale.value, self.scale.clean_steps = progress.scale, progress.clean_steps
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(take(f"parameter/{name}", parameter))
            if progress.updates:
                # The moments are put in place before the optimizer's first step here, which would zero them.
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(progress.updates)),
                    **{moment: take(f"{moment}/{name}", parameter) for moment in _MOMENTS},
                }
            parameter.grad = take(f"gradient/{name}", parameter) if progress.micro_step else None
        torch.set_rng_state(take("generator/cpu", torch.get_rng_state()))
        if self.on_gpu:
            torch.cuda.set_rng_state(take("generator/cuda", torch.cuda.get_rng_state()))
