"""The folders that flow between stages: each is checked when it is opened, and holds no tensors until it is asked.

`Checkpoint` is a 16-bit Hugging Face folder, `QuantizedCheckpoint` an NF4 store (ours or bitsandbytes'), `Adapter` a
PEFT adapter, `Run` what `finetune` writes. Each may be named by a folder or a Hub id (`user/name[@revision]`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from qlora_formats.adapter import ADAPTER_WEIGHTS, AdapterFolder
from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.hashing import hash_file
from qlora_formats.loading import Load
from qlora_formats.manifest import MANIFEST, Manifest
from qlora_formats.quant_state import is_state
from qlora_formats.store import Store, is_store
from qlora_pipe.errors import DataError, MissingInputError
from qlora_pipe.hub import Resolved, resolve
from qlora_pipe.model import Model, content_of, note_network


class Binding(NamedTuple):
    """Says of a store that it was quantised for an adapter beside it, and stands for its source only with that."""

    method: str
    rank: int
    iterations: int

    @classmethod
    def of(cls, manifest: Manifest | None) -> Self | None:
        """Read a manifest's field `bound_adapter`; None where there is none, DataError where it is not understood."""
        found = None if manifest is None else manifest.fields.get("bound_adapter")
        if found is None:
            return None
        method, rank, iterations = (found.get(key) if isinstance(found, dict) else None for key in cls._fields)
        if isinstance(method, str) and type(rank) is type(iterations) is int and min(rank, iterations) >= 1:
            return cls(method, rank, iterations)
        raise DataError(
            f"{MANIFEST} binds the store to an adapter in a way that is not understood ({str(found)[:80]}):"
            " update qlora-pipe, or make the store again."
        )


@dataclass(frozen=True)
class Checkpoint(Model):
    """A 16-bit (or 32-bit) Hugging Face checkpoint."""

    weights: CheckpointFolder

    @classmethod
    def open(cls, name: str | Path, *, load: Load = "mmap", note: Callable[[str], None] = lambda _: None) -> Self:
        """As `Model.open`; DataError where its weights were quantised, by whatever method."""
        opened = super().open(name, load=load, note=note)
        opened.require_plain()
        return opened

    @classmethod
    def at(cls, found: Resolved, *, load: Load = "mmap") -> Self:
        """Open what a name was resolved to; DataError where it holds 4-bit weights, whether or not it says so."""
        if is_store(found.path):
            raise DataError(f"{found.path} is already a 4-bit store; name the 16-bit checkpoint it was made from.")
        folder = CheckpointFolder.open(found.path, load=load)
        packed = next(filter(is_state, folder.names), None)
        if packed is not None:
            raise DataError(
                f"{found.path} holds weights in 4 bits ({packed}), and its config.json does not say so:"
                " make or fetch the folder again."
            )
        return cls(found.path, folder, found.repo, found.revision)

    def require_plain(self) -> None:
        """Raise DataError where a method that is not read here has quantised the weights: they are no plain numbers."""
        settings = self.config.get("quantization_config")
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise DataError(
                f"{self.path} was quantised (config.json: quantization_config, method {str(method)[:40]!r});"
                " only 16-bit and 32-bit weights and 4-bit ones of bitsandbytes are read."
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return self.weights.info(name).shape


@dataclass(frozen=True)
class QuantizedCheckpoint(Model):
    """A 4-bit store in bitsandbytes' layout."""

    weights: Store

    @classmethod
    def at(cls, found: Resolved, *, load: Load = "mmap") -> Self:
        """Open what a name was resolved to; DataError where it holds no 4-bit weights."""
        if not is_store(found.path):
            raise DataError(f"{found.path} is not a 4-bit store; make one: qlora-pipe quantize {found.path} OUT.")
        return cls(found.path, Store.open(found.path, load=load), found.repo, found.revision)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one weight, packed or not."""
        return self.weights.shape(name)

    @property
    def bound(self) -> Binding | None:
        """What adapter these weights were quantised for; None where they stand for their source by themselves."""
        return Binding.of(self.weights.manifest)

    @property
    def hub_name(self) -> str | None:
        """As `Model.hub_name`, and the source's only where its weights, quantised anew, would be these."""
        return super().hub_name if self.bound is None else self.repo


def open_model(
    name: str | Path, *, load: Load = "mmap", note: Callable[[str], None] = lambda _: None
) -> Checkpoint | QuantizedCheckpoint:
    """Open a base of either kind by its folder or Hub id; `load` and `note` as of `Model.open`."""
    found = resolve(str(name))
    note_network(found.path, load, note)
    if is_store(found.path):
        return QuantizedCheckpoint.at(found, load=load)
    opened = Checkpoint.at(found, load=load)
    opened.require_plain()
    return opened


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in PEFT's layout."""

    path: Path
    folder: AdapterFolder
    repo: str | None

    @classmethod
    def open(cls, name: str | Path, *, load: Load = "mmap") -> Self:
        """Open a folder or Hub id; errors as those of `at`, and of finding it."""
        return cls.at(resolve(str(name)), load=load)

    @classmethod
    def at(cls, found: Resolved, *, load: Load = "mmap") -> Self:
        """Open what a name was resolved to; a run's folder stands for the adapter it ended with."""
        path = Run(found.path).adapter_path if Run.is_run(found.path) else found.path
        return cls(path, AdapterFolder.open(path, load=load), found.repo)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Say which adapter this is without naming a path."""
        weights = self.path / ADAPTER_WEIGHTS
        return {"sha256": {weights.name: hash_file(weights).sha256}}

    def fits_content_of(self, base: Model) -> bool:
        """Whether this adapter was trained on the very weights of `base`, or does not say on which.

        The same weights count as the same wherever they were fetched from.
        """
        return self._made_for in ({}, content_of(base.identity))

    @property
    def names_its_base(self) -> bool:
        """Whether the adapter says which weights it was made for."""
        return bool(self._made_for)

    @property
    def _made_for(self) -> dict[str, Any]:
        manifest = self.folder.manifest
        return {} if manifest is None else content_of(manifest.inputs.get("base"))


def missing_part(base: Model, adapter: Adapter | None) -> str | None:
    """Say in a sentence what a store lacks that was quantised for an adapter; None where it has what it needs.

    An adapter trained from the one that it was quantised for names the same base, and is as good.
    """
    bound = base.bound if isinstance(base, QuantizedCheckpoint) else None
    if bound is None or (adapter is not None and adapter.names_its_base and adapter.fits_content_of(base)):
        return None
    if adapter is None:
        fault = "none was given"
    elif adapter.names_its_base:
        fault = "the one given was made for another base"
    else:
        fault = "the one given does not say which base it was made for"
    return (
        f"{base.repo or base.path.name} was quantised for an adapter ({bound.method}, rank {bound.rank},"
        f" {bound.iterations} iterations) and stands for the model only with that or one trained from it; {fault}."
    )


@dataclass(frozen=True)
class Run:
    """What `finetune` writes: the resolved settings, the metrics, checkpoints, and the adapter it ended with."""

    path: Path

    @staticmethod
    def is_run(path: Path) -> bool:
        """Say whether a folder is a run's."""
        return (path / "config.resolved.yaml").is_file()

    @property
    def config_path(self) -> Path:
        """The settings this run was started with."""
        return self.path / "config.resolved.yaml"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def quarantine_path(self) -> Path:
        """One JSON object per row that could not be used, where such rows are skipped."""
        return self.path / "quarantine.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        """The folder of training checkpoints."""
        return self.path / "checkpoints"

    @property
    def final_path(self) -> Path:
        """Where the adapter lies once the run has ended."""
        return self.path / "final"

    @property
    def adapter_path(self) -> Path:
        """The finished adapter; MissingInputError while the run has not ended."""
        if not self.final_path.is_dir():
            raise MissingInputError(
                f"{self.path} is a run that has not ended; run its command again and it goes on where it stopped."
            )
        return self.final_path
