"""One process' share of a run: put the adapter on, go on from where the run is, train, and log what is done."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pluggy

from qlora_formats.adapter_config import AdapterConfig
from qlora_formats.commit import AppendFile
from qlora_formats.errors import CommitError
from qlora_formats.manifest import difference
from qlora_pipe.artifacts import Adapter, Run
from qlora_pipe.config import FinetuneConfig
from qlora_pipe.data.batches import Stream
from qlora_pipe.data.encode import Sample
from qlora_pipe.nn.adapt import adaptable, adapters_of, add_adapters, attach_adapter, describe_adapter
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.optim.paged_adamw import PagedAdamW
from qlora_pipe.optim.storage import storage_for
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.checkpoint import restore_newest, save
from qlora_pipe.train.environment import fingerprint
from qlora_pipe.train.loop import Job, train
from qlora_pipe.train.recompute import RecomputePlan
from qlora_pipe.train.scaler import LossScale
from qlora_pipe.train.signals import StopFlag, StopRequested
from qlora_pipe.train.state import TrainingState

# How long training waits for a full disk before each further try.
RETRY_SECONDS = (5.0, 30.0, 120.0)


def adapt(model: LoadedModel, config: FinetuneConfig, *, start: Adapter | None) -> AdapterConfig:
    """Put a new adapter, or the one to go on from, on the model; describe it as PEFT does."""
    if start is not None:
        attach_adapter(model.module, start.folder.config, start.folder.pairs, dropout=config.dropout)
        described = dataclasses.replace(start.folder.config, lora_dropout=config.dropout)
    else:
        paths = adaptable(model.module, model.architecture)
        described = describe_adapter(
            paths, model.architecture, rank=config.rank, alpha=config.alpha, dropout=config.dropout
        )
        add_adapters(model.module, paths, described, dropout=config.dropout)
    for layer in adapters_of(model.module).values():
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
    return described


def new_state(model: LoadedModel, config: FinetuneConfig, *, scratch: Path) -> TrainingState:
    """Make the state of a run that has not begun: the adapters as they are, an optimizer without moments.

    `scratch` names a file that may take what of the moments exceeds the memory meant for them.
    """
    parameters = {
        f"{path}.{name}": parameter
        for path, layer in adapters_of(model.module).items()
        for name, parameter in (("lora_a", layer.lora_a), ("lora_b", layer.lora_b))
    }
    optimizer = PagedAdamW(
        parameters,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        bits=8 if config.optimizer == "adamw-8bit" else 32,
        storage=storage_for(model.device, budget=config.optimizer_budget, scratch=scratch),
    )
    return TrainingState(parameters, optimizer, LossScale.of(model.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A run, and what this process works on it with."""

    run: Run
    inputs: dict[str, Any]
    model: LoadedModel
    state: TrainingState
    config: FinetuneConfig
    train: Sequence[Sample]
    held_out: Sequence[Sample]
    manager: pluggy.PluginManager
    stop: StopFlag
    note: Callable[[str], None]

    def work(self) -> None:
        """Resume if there is something to resume from, and run the loop to its end; save where a signal stops it."""
        environment = fingerprint(self.model.device)
        self._resume(environment)
        progress = self.state.progress
        with AppendFile.open(self.run.metrics_path) as metrics:
            if metrics.size < progress.metrics_bytes:
                self.note(f"{self.run.metrics_path} lacks lines that were there when step {progress.step} was saved.")
            metrics.truncate(min(metrics.size, progress.metrics_bytes))

            def log(line: bytes) -> None:
                try:
                    metrics.append(line)
                except CommitError:
                    # A part of the line may have found room.
                    metrics.truncate(progress.metrics_bytes)
                    raise
                progress.metrics_bytes = metrics.size

            def report(entry: dict[str, Any]) -> None:
                self._patiently(partial(log, json.dumps(entry, allow_nan=False).encode() + b"\n"))
                self.manager.hook.step_finished(report=dict(entry))

            def commit() -> None:
                metrics.sync()
                save(self.run.checkpoints_path, self.state, inputs=self.inputs, environment=environment)

            job = Job(
                model=self.model,
                state=self.state,
                config=self.config,
                passes=BlockwisePass(
                    self.model, recompute=RecomputePlan(self.config.recompute), offload=self.config.offload
                ),
                stream=Stream(self.train, seed=self.config.seed, row_tokens=self.config.row_tokens),
                held_out=self.held_out,
                check_stop=self.stop.check,
                report=report,
                save=partial(self._patiently, commit),
            )
            try:
                train(job)
            except StopRequested:
                commit()
                raise

    def _patiently(self, write: Callable[[], None]) -> None:
        """Write; where the disk refuses, keep the state in memory, wait and try again, unless a signal has come."""
        for seconds in RETRY_SECONDS:
            try:
                return write()
            except CommitError as fault:
                if fault.reason != "disk" or self.stop.received is not None:
                    raise
                self.note(f"{fault}. Training waits, nothing is lost; the next try is in {seconds:g} seconds.")
                self._wait(seconds)
        return write()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.stop.received is None:
            time.sleep(min(0.2, seconds))

    def _resume(self, environment: dict[str, Any]) -> None:
        resumed = restore_newest(self.run.checkpoints_path, self.state, inputs=self.inputs, note=self.note)
        if resumed is None:
            return
        self.note(f"going on from step {self.state.progress.step}.")
        changed = difference(resumed.fields["environment"], environment)
        if changed is not None:
            self.note(f"this run will not be bit-exact: its checkpoint was made in another environment ({changed}).")
