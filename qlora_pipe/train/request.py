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
from qlora_pipe.data.samples import find_source, fingerprint_source
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import ExistsError
from qlora_pipe.settings import read_yaml, to_yaml

# Settings that the adapter does not follow from, or not by their text: they may change from one start to the next.
_FREE = (
    "save_every", "device", "threads", "load", "recompute", "offload", "residency", "optimizer_budget"
)  # fmt: skip
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


def inputs_of(
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
