"""The training loop: windows of forward passes, one update each, evaluations, metrics and checkpoints.

The loop is a machine whose whole memory is the TrainingState: it can be stopped between any two forward passes, and
goes on from a saved state with the same arithmetic in the same order.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_pipe.config import FinetuneConfig
from qlora_pipe.data.batches import Stream, eval_batches
from qlora_pipe.data.encode import Sample
from qlora_pipe.errors import NonFiniteError
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.guard import WINDOW, check_skipped
from qlora_pipe.train.loss import gradient_norm, summed_loss
from qlora_pipe.train.state import TrainingState


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the loop works on, and whom it tells."""

    model: LoadedModel
    state: TrainingState
    config: FinetuneConfig
    stream: Stream
    held_out: Sequence[Sample]
    passes: BlockwisePass
    check_stop: Callable[[], None]
    """Raises where the loop may stop: the state can be saved there."""
    report: Callable[[dict[str, Any]], None]
    """Takes the metrics of one finished step."""
    save: Callable[[], None]
    """Commits the state."""


def learning_rate(config: FinetuneConfig, step: int) -> float:
    """The rate of a step, counted from 1: a linear warm-up, then constant."""
    return config.learning_rate * min(1.0, step / config.warmup_steps if config.warmup_steps else 1.0)


def train(job: Job) -> None:
    """Run until the last step is done and reported; what `check_stop` raises passes through, the state whole."""
    progress, config = job.state.progress, job.config
    if job.held_out and progress.eval_loss_start is None:
        progress.eval_loss_start = evaluate(job)
    while progress.step < config.steps or progress.pending is not None:
        if progress.pending is None:
            progress.pending = _step(job)
        step = progress.step
        last = step == config.steps
        if job.held_out and (last or (config.eval_every and step % config.eval_every == 0)):
            progress.eval_loss = progress.pending["eval_loss"] = evaluate(job)
        job.report(progress.pending)
        progress.pending = None
        if last or (config.save_every and step % config.save_every == 0):
            job.save()
        job.check_stop()


@torch.no_grad()
def evaluate(job: Job) -> float:
    """The mean loss per trained token of the held-out samples; NonFiniteError names the rows where there is none."""
    job.model.module.eval()
    total, tokens = 0.0, 0
    for batch in eval_batches(job.held_out, batch_size=job.config.batch_size, row_tokens=job.config.row_tokens):
        job.check_stop()
        loss = float(summed_loss(job.model, batch))
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"step {job.state.progress.step}: the loss of the held-out rows {', '.join(batch.origins)} is not"
                " finite. Look at them, or lower --learning-rate; the last checkpoint is whole."
            )
        total += loss
        tokens += batch.trained
    return total / tokens


def _step(job: Job) -> dict[str, Any]:
    """Do the rest of the open window and its update; give the step's metrics."""
    progress, config = job.state.progress, job.config
    start = progress.position - progress.micro_step * config.batch_size
    window = [
        job.stream.batch(start + index * config.batch_size, rows=config.batch_size)
        for index in range(config.accumulate)
    ]
    trained = sum(batch.trained for batch in window)
    job.model.module.train()
    losses: list[Tensor] = []
    try:
        while progress.micro_step < config.accumulate:
            job.check_stop()
            begun = time.monotonic()
            count = config.accumulate - progress.micro_step if job.passes.whole_windows else 1
            now = window[progress.micro_step : progress.micro_step + count]
            # Dividing by the whole window's trained tokens gives each the same weight, however the window is split.
            losses += job.passes.run(now, divisor=trained, loss_scale=job.state.scale.value)
            progress.position += count * config.batch_size
            progress.micro_step += count
            progress.seconds += time.monotonic() - begun
    finally:
        # Read once there is nothing left to be queued: to read one waits for the device.
        progress.loss_sum = sum(map(float, losses), start=progress.loss_sum)
    begun = time.monotonic()
    rate = learning_rate(config, progress.step + 1)
    norm = _update(job, rate=rate, origins=[origin for batch in window for origin in batch.origins])
    metrics: dict[str, Any] = {
        "step": progress.step + 1,
        "loss": progress.loss_sum if math.isfinite(progress.loss_sum) else None,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": sum(batch.tokens for batch in window),
        "seconds": round(progress.seconds + time.monotonic() - begun, 6),
    }
    if norm is None:
        metrics["skipped"] = True
    if progress.step == 0 and progress.eval_loss_start is not None:
        metrics["eval_loss_start"] = progress.eval_loss_start
    progress.step += 1
    progress.tokens += metrics["tokens"]
    progress.micro_step, progress.loss_sum, progress.seconds = 0, 0.0, 0.0
    return metrics


def _update(job: Job, *, rate: float, origins: Sequence[str]) -> float | None:
    """Clip and apply the window's gradients; give their norm, or None where the step had to be skipped."""
    state, progress, config = job.state, job.state.progress, job.config
    parameters = list(state.parameters.values())
    norm = float(gradient_norm(parameters)) / state.scale.value
    finite = math.isfinite(norm) and math.isfinite(progress.loss_sum)
    if finite:
        # The small number is torch.nn.utils.clip_grad_norm_'s: curves stay comparable with other trainers'.
        factor = min(1.0, config.max_grad_norm / (norm + 1e-6)) if config.max_grad_norm else 1.0
        factor /= state.scale.value
        for parameter in parameters:
            if parameter.grad is not None and factor != 1.0:
                parameter.grad.mul_(factor)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        state.scale.stepped()
        progress.updates += 1
    elif not (math.isfinite(progress.loss_sum) and state.scale.overflowed()):
        progress.skipped = [*progress.skipped, progress.step + 1][-WINDOW:]
        what = "gradient" if math.isfinite(progress.loss_sum) else "loss"
        check_skipped(progress.skipped, step=progress.step + 1, what=what, origins=origins)
    state.optimizer.zero_grad(set_to_none=True)
    return norm if finite else None
