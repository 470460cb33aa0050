"""Training checkpoints: the whole state in `checkpoints/step-N`, committed as one folder, two of them kept."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_formats.commit import commit_folder
from qlora_formats.errors import CommitError, FormatError
from qlora_formats.manifest import Manifest
from qlora_formats.removal import remove_folder, set_aside
from qlora_formats.strict_json import is_int
from qlora_formats.tensorfile import TensorFile, TensorPlan, write_tensors
from qlora_pipe.errors import ExistsError
from qlora_pipe.train.state import Progress, TrainingState

STATE = "state.safetensors"
KEPT = 2
_NAME = re.compile(r"step-(\d+)(?:-micro-(\d+)|-(evaluating))?\Z")


def name_of(progress: Progress) -> str:
    """Name the moment: after a step, in the evaluation that follows it, or within the next window."""
    if progress.micro_step:
        return f"step-{progress.step}-micro-{progress.micro_step}"
    return f"step-{progress.step}" + ("-evaluating" if progress.pending is not None else "")


def _moment(path: Path) -> tuple[int, int] | None:
    found = _NAME.match(path.name)
    if found is None:
        return None
    step, micro, evaluating = found.groups()
    return int(step), -1 if evaluating else int(micro or 0)


def checkpoints(folder: Path) -> list[Path]:
    """List the committed checkpoints, the newest first."""
    found = [(moment, path) for path in folder.glob("step-*") if (moment := _moment(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def save(folder: Path, state: TrainingState, *, inputs: Mapping[str, Any], environment: Mapping[str, Any]) -> Path:
    """Commit the state, unless this moment is saved already; then remove what is older than the newest two."""
    state.progress.scale, state.progress.clean_steps = state.scale.value, state.scale.clean_steps
    target = folder / name_of(state.progress)
    if target.exists():
        # A signal came right after the save. (A damaged folder of this name was set aside on resume.)
        return target
    tensors = dict(state.tensors())
    layout = [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    fields = {"progress": dataclasses.asdict(state.progress), "environment": dict(environment)}
    with commit_folder(target, kind="training", inputs=inputs, restart=True) as work:
        with work.create(STATE) as stream:
            write_tensors(stream, layout, tensors.__getitem__)
        work.finish(fields)
    for old in checkpoints(folder)[KEPT:]:
        _discard(old)
    return target


def _discard(folder: Path) -> None:
    """Delete a checkpoint; set it aside where its manifest does not prove that all of it is ours."""
    try:
        remove_folder(folder)
    except FormatError as fault:
        if isinstance(fault, CommitError) and fault.reason == "disk":
            raise
        set_aside(folder)


def _progress(manifest: Manifest, path: Path) -> Progress:
    found = manifest.fields.get("progress")
    counters = {field.name: field.default for field in dataclasses.fields(Progress)}
    if (
        not isinstance(found, dict)
        or found.keys() != counters.keys()
        or not all(is_int(found[name]) for name, default in counters.items() if is_int(default))
    ):
        raise FormatError(f"the manifest of {path} does not hold the counters that this version saves")
    return Progress(**found)


def restore_newest(
    folder: Path, state: TrainingState, *, inputs: Mapping[str, Any], note: Callable[[str], None]
) -> Manifest | None:
    """Take over the newest valid checkpoint; None where there is none.

    A newer one that is damaged is set aside, and `note` is told why. Raises ExistsError where the newest valid one
    belongs to other inputs: the base, the data or a setting changed.
    """
    for path in checkpoints(folder):
        try:
            manifest = Manifest.read(path)
            manifest.verify(path)
            # Read once and copied: nothing is gained by a mapping.
            file = TensorFile.open(path / STATE, load="read")
            progress = _progress(manifest, path)
        except FormatError as fault:
            note(f"passed over the checkpoint {path.name}, now {set_aside(path).name}: {fault}.")
            continue
        if (changed := manifest.difference(inputs)) is not None:
            raise ExistsError(f"{path} was saved by a run of other inputs: {changed}. Name another --out.")
        state.restore({name: file.tensor(name) for name in file.infos}, progress)
        return manifest
    return None
