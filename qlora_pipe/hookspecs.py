"""The hooks: what a plugin may implement, each called at the time its sentence says.

A plugin is a module whose functions are marked with `hookimpl` and return data. An implementation may take fewer
arguments than the hook offers.
"""

from collections.abc import Mapping
from typing import Any

import pluggy

from qlora_pipe.architecture import Architecture
from qlora_pipe.chat_template import ChatTemplate
from qlora_pipe.dataset import Dataset
from qlora_pipe.exporter import Exporter

PROJECT = "qlora_pipe"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_architectures() -> list[Architecture]:  # type: ignore[empty-body]
    """Return the model families this plugin can build; called at the first look-up of a model."""


@hookspec(firstresult=True)
def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Return a family made for a model's config; None leaves it to the next plugin, and at last to an error.

    Called where a model is opened whose `model_type` is registered by nobody.
    """


@hookspec
def register_datasets() -> list[Dataset]:  # type: ignore[empty-body]
    """Return named sources of examples; called at the first look-up of a dataset."""


@hookspec
def register_chat_templates() -> list[ChatTemplate]:  # type: ignore[empty-body]
    """Return named forms of conversations; called at the first look-up of a template."""


@hookspec
def register_exporters() -> list[Exporter]:  # type: ignore[empty-body]
    """Return named targets of `export`; called at the first look-up of a target."""


@hookspec(firstresult=True)
def choose_precision(model_type: str, tensor: str) -> str | None:
    """Return "nf4" (or "fp4", the type asked for) or "keep" for one tensor; None leaves it to the architecture.

    Called for each tensor of a model when `quantize` begins.
    """


@hookspec
def step_finished(report: dict[str, Any]) -> None:
    """Called after each optimizer step with the object that metrics.jsonl gets; loggers live here."""
