"""Targets of `qlora-pipe export`, one file each."""

from qlora_pipe.exporter import Exporter
from qlora_pipe.hookspecs import hookimpl
from qlora_plugins.exporters import hub


@hookimpl
def register_exporters() -> list[Exporter]:
    """The Hugging Face Hub, or whatever answers at HF_ENDPOINT."""
    return [
        Exporter(
            name="hub",
            help="Push an adapter, a store or a merged folder to the Hugging Face Hub, with a model card.",
            push=hub.push,
        )
    ]
