"""Finetune: from a base and data to a run, whose `final/` is a LoRA adapter in PEFT's layout."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluggy
import torch

from qlora_formats.adapter import write_adapter
from qlora_formats.adapter_config import AdapterConfig
from qlora_formats.commit import AppendFile, PartialFolder, commit_folder, write_file
from qlora_formats.journal import temporaries
from qlora_formats.manifest import difference
from qlora_formats.target import finished, partial_path
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint, Run, open_model
from qlora_pipe.config import FinetuneConfig
from qlora_pipe.data.encode import Sample
from qlora_pipe.data.samples import find_source, fingerprint_source, load_samples, split_held_out
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import ConfigError, ExistsError, NonFiniteError
from qlora_pipe.nn.adapt import adaptable, adapters_of, add_adapters, attach_adapter, pairs_of
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture
from qlora_pipe.settings import read_yaml, to_yaml
from qlora_pipe.stages.load import choose_device, choose_dtype, load
from qlora_pipe.train.checkpoint import restore_newest, save
from qlora_pipe.train.environment import fingerprint as environment_of
from qlora_pipe.train.loop import Job, train
from qlora_pipe.train.scaler import LossScale
from qlora_pipe.train.signals import StopFlag, StopRequested, stop_flag
from qlora_pipe.train.state import Progress, TrainingState

# Settings that the adapter does not follow from, or not by their text: they may change from one start to the next.
_FREE = ("save_every", "device", "threads")
_NAMED_BY_CONTENT = ("adapter", "eval_data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneRequest:
    """What was asked for, as the command line or run.yaml names it."""

    base: str
    data: str
    out: Path
    config: FinetuneConfig

    @property
    def resolved(self) -> dict[str, Any]:
        """Everything but where the run lies: what config.resolved.yaml holds, which can be given as run.yaml."""
        settings = {key: value for key, value in dataclasses.asdict(self.config).items() if value is not None}
        if self.config.eval_data:
            # The two exclude each other, and this one was not used.
            del settings["held_out"]
        return {"base": self.base, "data": self.data, **settings}


def finetune(
    request: FinetuneRequest,
    *,
    manager: pluggy.PluginManager,
    note: Callable[[str], None] = lambda _: None,
    progress: Callable[[str, int, int | None], None] = lambda _what, _done, _total: None,
) -> Run:
    """Train a LoRA adapter on a frozen base.

    Called again with the same request it goes on from the newest valid checkpoint and ends with the same bytes; a
    run that has ended is left as it is. `note` takes sentences for the user, `progress` the rows tokenised so far. Each
    step goes to the `step_finished` hook. Raises ExistsError where `out` holds something else, Interrupted once a
    signal's checkpoint is saved.
    """
    run, config = Run(request.out), request.config
    if config.threads:
        torch.set_num_threads(config.threads)
    with stop_flag() as stop:
        base = open_model(request.base)
        architecture = find_architecture(manager, base.config.get("model_type"))
        tokenizer = Tokenizer.open(base.path)
        start = Adapter.open(config.adapter) if config.adapter else None
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        inputs = _inputs(request, manager, base=base, tokenizer=tokenizer, start=start, dtype=dtype)
        if run.final_path.exists() and finished(run.final_path, kind="adapter", inputs=inputs) is not None:
            note(f"{run.path} is already done: same base, data and settings.")
            return run
        _refuse_another(run, request)
        held_in, held_out = _samples(request, manager, tokenizer=tokenizer, stop=stop, note=note, progress=progress)
        # From here on every draw comes from this seed: the adapter's first values, then the dropout.
        torch.manual_seed(config.seed)
        model = load(base, architecture, dtype=dtype, device=device)
        model.require_ids(int(sample.ids.max()) for sample in (*held_in, *held_out))
        described = _adapt(model, config, start=start)
        state, environment = _new_state(model, config), environment_of(device)
        # The folder that the run ends in is begun at once: its lock keeps a second process off everything else.
        with commit_folder(run.final_path, kind="adapter", inputs=inputs, restart=True) as final:
            _claim(run, request)
            resumed = restore_newest(run.checkpoints_path, state, inputs=inputs, note=note)
            if resumed is not None:
                note(f"going on from step {state.progress.step}.")
                changed = difference(resumed.fields["environment"], environment)
                if changed is not None:
                    note(f"this run will not be bit-exact: its checkpoint was made in another environment ({changed}).")
            with AppendFile.open(run.metrics_path) as metrics:
                if metrics.size < state.progress.metrics_bytes:
                    note(f"{run.metrics_path} lacks lines that were there when step {state.progress.step} was saved.")
                metrics.truncate(min(metrics.size, state.progress.metrics_bytes))

                def report(entry: dict[str, Any]) -> None:
                    metrics.append(json.dumps(entry, allow_nan=False).encode() + b"\n")
                    state.progress.metrics_bytes = metrics.size
                    manager.hook.step_finished(report=dict(entry))

                def commit() -> None:
                    metrics.sync()
                    save(run.checkpoints_path, state, inputs=inputs, environment=environment)

                job = Job(
                    model=model, state=state, config=config, train=held_in, held_out=held_out,
                    check_stop=stop.check, report=report, save=commit,
                )  # fmt: skip
                try:
                    train(job)
                except StopRequested:
                    commit()
                    raise
            described = dataclasses.replace(described, base_model_name_or_path=base.hub_name)
            _write_final(final, model, described, base=base, progress=state.progress)
    return run


def _inputs(
    request: FinetuneRequest,
    manager: pluggy.PluginManager,
    *,
    base: Checkpoint | QuantizedCheckpoint,
    tokenizer: Tokenizer,
    start: Adapter | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All that the adapter's bytes follow from, by content and never by path."""
    config = request.config

    def content(spec: str) -> str:
        source = find_source(spec, manager=manager)
        return fingerprint_source(source, tokenizer=tokenizer, max_tokens=config.max_tokens)

    settings = {
        key: value for key, value in dataclasses.asdict(config).items() if key not in (*_FREE, *_NAMED_BY_CONTENT)
    }
    settings["dtype"] = str(dtype).removeprefix("torch.")
    inputs: dict[str, Any] = {"base": base.identity, "data": content(request.data), "settings": settings}
    if config.eval_data:
        inputs["eval_data"] = content(config.eval_data)
    if start is not None:
        inputs["adapter"] = start.identity
    return inputs


def _refuse_another(run: Run, request: FinetuneRequest) -> None:
    """Raise ExistsError where something else than this run lies in its place."""
    if not run.is_run(run.path):
        # All that a process leaves which is killed before it has written the settings.
        begun = {partial_path(run.final_path), *temporaries(run.path)} if run.path.is_dir() else set()
        if run.path.exists() and not (run.path.is_dir() and begun.issuperset(run.path.iterdir())):
            raise ExistsError(f"{run.path} already exists and is not a run of qlora-pipe; name another --out.")
        return
    there, asked = read_yaml(run.config_path), request.resolved
    for key in _FREE:
        there.pop(key, None), asked.pop(key)
    if (changed := difference(there, asked)) is not None:
        raise ExistsError(
            f"{run.path} holds a run with other settings: {changed}."
            " Name another --out, or give the settings it was started with."
        )


def _claim(run: Run, request: FinetuneRequest) -> None:
    """Write the settings of a run that begins, or make sure that the ones there are this run's."""
    _refuse_another(run, request)
    if not run.is_run(run.path):
        write_file(run.config_path, to_yaml(request.resolved).encode())


def _samples(
    request: FinetuneRequest,
    manager: pluggy.PluginManager,
    *,
    tokenizer: Tokenizer,
    stop: StopFlag,
    note: Callable[[str], None],
    progress: Callable[[str, int, int | None], None],
) -> tuple[list[Sample], list[Sample]]:
    """Load the samples to train on and those to evaluate on."""
    config = request.config

    def read(spec: str) -> list[Sample]:
        found = load_samples(
            spec,
            tokenizer=tokenizer,
            max_tokens=config.max_tokens,
            manager=manager,
            check=stop.check,
            progress=lambda done, total: progress("tokenise rows", done, total),
        )
        if found.stats.cut:
            note(f"{found.stats.cut} of {found.stats.samples} samples were cut at {config.max_tokens} tokens.")
        return found.samples

    if config.eval_data:
        return read(request.data), read(config.eval_data)
    return split_held_out(read(request.data), share=config.held_out, seed=config.seed)


def _adapt(model: LoadedModel, config: FinetuneConfig, *, start: Adapter | None) -> AdapterConfig:
    """Put a new adapter, or the one to go on from, on the model; describe it as PEFT does."""
    if start is not None:
        attach_adapter(model.module, start.folder.config, start.folder.pairs, dropout=config.dropout)
        described = dataclasses.replace(start.folder.config, lora_dropout=config.dropout)
    else:
        paths = adaptable(model.module, model.architecture)
        if not paths:
            raise ConfigError(f"the plugin for {model.architecture.name} names no layer of this model to adapt.")
        described = AdapterConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=sorted({path.rpartition(".")[2] for path in paths}),
            task_type=model.architecture.task_type,
        )
        add_adapters(model.module, paths, described, dropout=config.dropout)
    for layer in adapters_of(model.module).values():
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
    return described


def _new_state(model: LoadedModel, config: FinetuneConfig) -> TrainingState:
    parameters = {
        f"{path}.{name}": parameter
        for path, layer in adapters_of(model.module).items()
        for name, parameter in (("lora_a", layer.lora_a), ("lora_b", layer.lora_b))
    }
    optimizer = torch.optim.AdamW(
        list(parameters.values()),
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        foreach=False,
        fused=False,
    )
    return TrainingState(parameters, optimizer, LossScale.of(model.dtype))


def _write_final(
    final: PartialFolder,
    model: LoadedModel,
    described: AdapterConfig,
    *,
    base: Checkpoint | QuantizedCheckpoint,
    progress: Progress,
) -> None:
    """Commit the adapter as PEFT reads it, with the tokenizer and what was measured."""
    pairs = pairs_of(model.module)
    if not all(bool(torch.isfinite(part).all()) for pair in pairs.values() for part in pair):
        raise NonFiniteError("the adapter holds values that are not finite; lower --learning-rate and start again.")
    measured = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "eval_loss_start": progress.eval_loss_start,
        "eval_loss": progress.eval_loss,
    }
    write_adapter(final, config=described, pairs=pairs, metadata={})
    for file in base.tokenizer_files:
        final.copy(file, file.name)
    final.finish({"measured": measured})
