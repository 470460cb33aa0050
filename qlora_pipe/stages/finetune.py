"""Finetune: from a base and data to a run, whose `final/` is a LoRA adapter in PEFT's layout."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import pluggy
import torch

from qlora_formats.adapter import write_adapter
from qlora_formats.adapter_config import AdapterConfig
from qlora_formats.commit import AppendFile, PartialFolder, commit_folder
from qlora_formats.target import finished
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint, Run, missing_part, open_model
from qlora_pipe.config import FinetuneConfig
from qlora_pipe.data.encode import Encoder, Sample
from qlora_pipe.data.place import cache_folder
from qlora_pipe.data.samples import SampleSet, load_samples, split_held_out
from qlora_pipe.data.source import DataSource
from qlora_pipe.data.templates import TEMPLATE_FILE
from qlora_pipe.errors import ConfigError, NonFiniteError
from qlora_pipe.nn.adapt import pairs_of
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture
from qlora_pipe.stages.encoder import encoder_of
from qlora_pipe.stages.load import choose_device, choose_dtype, load, note_slow_kernels
from qlora_pipe.train.estimate import step_bytes
from qlora_pipe.train.memory import keep_freed_memory
from qlora_pipe.train.request import FinetuneRequest, claim, inputs_of, refuse_another
from qlora_pipe.train.session import Session, adapt, new_state
from qlora_pipe.train.signals import StopFlag, stop_flag
from qlora_pipe.train.state import Progress


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
        base = open_model(request.base, load=config.load, note=note)
        architecture = find_architecture(manager, base.config.get("model_type"), config=base.config)
        encoder = encoder_of(base, architecture, config, manager=manager, note=note)
        start = Adapter.open(config.adapter, load=config.load) if config.adapter else None
        _check_start(base, start, note=note)
        device = choose_device(config.device)
        note_slow_kernels(device, note)
        if device.type == "cpu":
            keep_freed_memory()
        dtype = choose_dtype(config.dtype, device, architecture)
        data, eval_data = request.sources(manager)
        inputs = inputs_of(
            request, base=base, data=data, eval_data=eval_data, encoding=encoder.fingerprint, start=start, dtype=dtype
        )
        if run.final_path.exists() and finished(run.final_path, kind="adapter", inputs=inputs) is not None:
            note(f"{run.path} is already done: same base, data and settings.")
            return run
        refuse_another(run, request)
        read = partial(_read, config=config, encoder=encoder, manager=manager, stop=stop, note=note, progress=progress)
        samples = [read(each) for each in (data, eval_data) if each is not None]
        held_in, held_out = _divided(samples, config)
        example = data.first_example()
        template = None if example is None else encoder.shared_template(example)
        # From here on every draw comes from this seed: the adapter's first values, then the dropout.
        torch.manual_seed(config.seed)
        sides = 2 if architecture.kind == "seq2seq" else 1
        tokens = sides * config.batch_size * config.max_tokens
        model = load(
            base,
            architecture,
            dtype=dtype,
            device=device,
            residency=config.residency,
            step_bytes=step_bytes(base, architecture, rank=config.rank, tokens=tokens, dtype=dtype),
            note=note,
        )
        model.require_ids(each.stats.largest_id for each in samples)
        described = adapt(model, config, start=start)
        session = Session(
            run=run,
            inputs=inputs,
            model=model,
            state=new_state(model, config, scratch=run.path / "optimizer"),
            config=config,
            train=held_in,
            held_out=held_out,
            manager=manager,
            stop=stop,
            note=note,
        )
        # The folder that the run ends in is begun at once: its lock keeps a second process off everything else.
        with commit_folder(run.final_path, kind="adapter", inputs=inputs, restart=True) as final:
            claim(run, request)
            _keep_bad_rows(run, samples)
            session.work()
            described = dataclasses.replace(described, base_model_name_or_path=base.hub_name)
            _write_final(
                final, model, described, base=base, samples=samples, template=template,
                progress=session.state.progress,
            )  # fmt: skip
    return run


def _check_start(base: Checkpoint | QuantizedCheckpoint, start: Adapter | None, *, note: Callable[[str], None]) -> None:
    """Refuse to train on a base without what belongs to it; say so where an adapter may belong to another one."""
    if (fault := missing_part(base, start)) is not None:
        if start is not None and not start.names_its_base:
            note(fault)
            return
        raise ConfigError(
            f"{fault} Add --adapter with the folder that `quantize` wrote beside the store, its name and `-loftq`,"
            " or with an adapter trained from that."
        )
    if start is not None and not start.fits_content_of(base):
        note("the adapter to go on from was trained on another base than this one.")


def _read(
    source: DataSource,
    *,
    config: FinetuneConfig,
    encoder: Encoder,
    manager: pluggy.PluginManager,
    stop: StopFlag,
    note: Callable[[str], None],
    progress: Callable[[str, int, int | None], None],
) -> SampleSet:
    """Load the samples of one source, and say what there is to say of them."""
    if source.hub:
        note(f"the data is {source.hub['repo']} of the Hub at its commit {source.hub['revision']}.")
    found = load_samples(
        source,
        encoder=encoder,
        manager=manager,
        on_bad_row=config.on_bad_row,
        cache=cache_folder(),
        check=stop.check,
        progress=lambda done, total: progress("tokenise rows", done, total),
        note=note,
    )
    stats = found.stats
    if stats.bad:
        note(
            f"{stats.bad} of {stats.rows + stats.bad} rows can't be used and are left out:"
            " quarantine.jsonl in the run's folder has each of them with the reason."
        )
    if stats.cut:
        note(f"{stats.cut} of {stats.samples} samples were cut at {config.max_tokens} tokens.")
    return found


def _divided(samples: Sequence[SampleSet], config: FinetuneConfig) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The samples to train on, and those to evaluate on: another source's, or a share of the same."""
    if len(samples) == 1:
        return split_held_out(samples[0].samples, share=config.held_out, seed=config.seed)
    train, evaluation = samples
    return train.samples, evaluation.samples


def _keep_bad_rows(run: Run, samples: Sequence[SampleSet]) -> None:
    """Write the rows that could not be used, and why, into the run's folder."""
    if not any(each.stats.bad for each in samples):
        return
    with AppendFile.open(run.quarantine_path) as file:
        # A process before this one may have written some of it.
        file.truncate(0)
        for each in samples:
            for line in each.quarantine():
                file.append(line)
        file.sync()


def _write_final(
    final: PartialFolder,
    model: LoadedModel,
    described: AdapterConfig,
    *,
    base: Checkpoint | QuantizedCheckpoint,
    samples: Sequence[SampleSet],
    template: str | None,
    progress: Progress,
) -> None:
    """Commit the adapter as PEFT reads it, with the tokenizer, the chat template, what was measured, and its data."""
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
        if template is None or file.name != TEMPLATE_FILE:
            final.copy(file, file.name)
    if template is not None:
        final.write(TEMPLATE_FILE, template.encode())
    from_hub = [dict(each.source.hub) for each in samples if each.source.hub]
    final.finish({"measured": measured} | ({"data": from_hub} if from_hub else {}))
