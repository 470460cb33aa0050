"""What a fine-tune was asked for: which run it is, what its result follows from, and whose folder that is."""

import dataclasses
from pathlib import Path
from typing import Any

import pluggy
import torch

from qlora_formats.commit import write_file
from qlora_formats.journal import temporaries
from qlora_formats.manifest import difference
from qlora_formats.target import partial_path
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint, Run
from qlora_pipe.config import FinetuneConfig
from qlora_pipe.data.source import DataSource, find_source, parse_fields
from qlora_pipe.errors import ExistsError
from qlora_pipe.settings import read_yaml, to_yaml

# Settings that the adapter does not follow from, or not by their text: they may change from one start to the next.
_FREE = (
    "save_every", "device", "threads", "load", "recompute", "offload", "residency", "optimizer_budget", "on_bad_row"
)  # fmt: skip
_NAMED_BY_CONTENT = ("adapter", "split", "map", "template", "eval_data", "eval_split", "eval_map")


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
        settings = {key: value for key, value in dataclasses.asdict(self.config).items() if value not in (None, ())}
        if self.config.eval_data or self.config.eval_split:
            # The two exclude each other, and this one was not used.
            del settings["held_out"]
        return {"base": self.base, "data": self.data, **settings}

    def sources(self, manager: pluggy.PluginManager) -> tuple[DataSource, DataSource | None]:
        """Find the data to train on and, unless a share of it is held out, the data to evaluate on."""
        config, fields = self.config, parse_fields(self.config.map)
        data = find_source(self.data, manager=manager, split=config.split, fields=fields)
        if not (config.eval_data or config.eval_split):
            return data, None
        spec = config.eval_data or self.data
        same = spec.partition(":")[0].partition("@")[0] == data.dataset.name
        eval_fields = parse_fields(config.eval_map) or (fields if same else {})
        return data, find_source(spec, manager=manager, split=config.eval_split, fields=eval_fields)


def inputs_of(
    request: FinetuneRequest,
    *,
    base: Checkpoint | QuantizedCheckpoint,
    data: DataSource,
    eval_data: DataSource | None,
    encoding: str,
    start: Adapter | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All that the adapter's bytes follow from, by content and never by path; `encoding` is the encoder's."""
    settings = {
        key: value
        for key, value in dataclasses.asdict(request.config).items()
        if key not in (*_FREE, *_NAMED_BY_CONTENT)
    }
    settings["dtype"] = str(dtype).removeprefix("torch.")
    inputs: dict[str, Any] = {"base": base.identity, "data": data.fingerprint(encoding), "settings": settings}
    if eval_data is not None:
        inputs["eval_data"] = eval_data.fingerprint(encoding)
    if start is not None:
        inputs["adapter"] = start.identity
    return inputs


def refuse_another(run: Run, request: FinetuneRequest) -> None:
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


def claim(run: Run, request: FinetuneRequest) -> None:
    """Write the settings of a run that begins, or make sure that the ones there are this run's."""
    refuse_another(run, request)
    if not run.is_run(run.path):
        write_file(run.config_path, to_yaml(request.resolved).encode())
