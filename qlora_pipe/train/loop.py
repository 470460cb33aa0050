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
from qlora_pipe.optim.pager import Moved
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.clip import clip_factor
from qlora_pipe.train.guard import WINDOW, check_skipped
from qlora_pipe.train.loss import gradient_norm, summed_loss
from qlora_pipe.train.state import Progress, TrainingState


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
        if progress.micro_step < config.accumulate:
            _read(losses, progress)
    begun = time.monotonic()
    rate = learning_rate(config, progress.step + 1)
    norm, moved = update(job, losses, rate=rate, origins=[origin for batch in window for origin in batch.origins])
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
    if job.model.device.type == "cuda":
        metrics["peak_mib"] = torch.cuda.max_memory_allocated(job.model.device) >> 20
    if moved.pages_in:
        metrics |= {"pages_in": moved.pages_in, "pages_out": moved.pages_out}
        metrics["page_bytes"] = moved.bytes_in + moved.bytes_out
    if progress.step == 0 and progress.eval_loss_start is not None:
        metrics["eval_loss_start"] = progress.eval_loss_start
    progress.step += 1
    progress.tokens += metrics["tokens"]
    progress.micro_step, progress.loss_sum, progress.seconds = 0, 0.0, 0.0
    return metrics


def _read(losses: Sequence[Tensor], progress: Progress) -> None:
    """Add up what the passes gave; to read it waits for the device, so it is done once nothing is left to be queued."""
    progress.loss_sum = sum(map(float, losses), start=progress.loss_sum)


def update(job: Job, losses: Sequence[Tensor], *, rate: float, origins: Sequence[str]) -> tuple[float | None, Moved]:
    """Clip and apply the window's gradients; give their norm, or None where the step had to be skipped, and the pages.

    The update is on its way before the host reads norm and losses: where these are not finite, it changes nothing.
    """
    state, progress, config = job.state, job.state.progress, job.config
    scaled_norm = gradient_norm(list(state.parameters.values()))
    loss = torch.stack(tuple(losses)).sum() + progress.loss_sum
    factor = clip_factor(scaled_norm, loss=loss, scale=state.scale.value, limit=config.max_grad_norm)
    moved = state.optimizer.step(lr=rate, number=progress.updates + 1, factor=factor)
    _read(losses, progress)
    norm = float(scaled_norm) / state.scale.value
    finite = math.isfinite(norm) and math.isfinite(progress.loss_sum)
    if finite:
        state.scale.stepped()
        progress.updates += 1
    elif not (math.isfinite(progress.loss_sum) and state.scale.overflowed()):
        progress.skipped = [*progress.skipped, progress.step + 1][-WINDOW:]
        what = "gradient" if math.isfinite(progress.loss_sum) else "loss"
        check_skipped(progress.skipped, step=progress.step + 1, what=what, origins=origins)
    state.optimizer.zero_grad()
    return norm if finite else None, moved
