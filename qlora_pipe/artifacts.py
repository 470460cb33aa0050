"""The folders that flow between stages: each is checked when it is opened, and holds no tensors until it is asked.

`Checkpoint` is a 16-bit Hugging Face folder, `QuantizedCheckpoint` an NF4 store (ours or bitsandbytes'), `Adapter` a
PEFT adapter, `Run` what `finetune` writes. Each may be named by a folder or a Hub id (`user/name[@revision]`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from qlora_formats.adapter import ADAPTER_WEIGHTS, AdapterFolder
from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.hashing import hash_file, hash_files
from qlora_formats.loading import Load, network_mount
from qlora_formats.store import Store, is_store
from qlora_formats.strict_json import read_object
from qlora_pipe.errors import DataError, MissingInputError
from qlora_pipe.hub import Resolved, resolve

# The parts of an identity that say what the weights are.
_CONTENT = ("manifest", "sha256")
_TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece", "chat_template")


@dataclass(frozen=True)
class Model:
    """A folder with a config and weights: what every stage takes as its base."""

    path: Path
    weights: CheckpointFolder | Store
    repo: str | None
    revision: str | None
    made_from: Mapping[str, str] | None = None
    """Where the folder only stands in for other files, such as pickles: the sha256 of those, by name."""

    @classmethod
    def open(cls, name: str | Path, *, load: Load = "mmap", note: Callable[[str], None] = lambda _: None) -> Self:
        """Open a folder or Hub id; errors as those of `at`, and of finding it.

        `load` says how its tensors come into memory; `note` is told where another way would be better.
        """
        found = resolve(str(name))
        note_network(found.path, load, note)
        return cls.at(found, load=load)

    @classmethod
    def at(cls, found: Resolved, *, load: Load = "mmap") -> Self:
        """Open what a name was resolved to."""
        raise NotImplementedError

    @property
    def config(self) -> Mapping[str, Any]:
        """What config.json holds."""
        return self.weights.config

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Say which model this is without naming a path: Hub id, revision, and the hash of what it holds."""
        return self.identified()

    def identified(self, *, progress: Callable[[int, int], None] = lambda _done, _total: None) -> dict[str, Any]:
        """As `identity`, which reads every byte of a folder without a manifest; `progress` may raise to end it."""
        if self.made_from is not None:
            return {"sha256": dict(self.made_from)} | self._named
        if self.weights.manifest is not None:
            return {"manifest": self.weights.manifest.digest} | self._named
        found = hash_files(self._content_files, progress=progress)
        return {"sha256": {path.name: found[path].sha256 for path in found}} | self._named

    @property
    def stamp(self) -> dict[str, Any]:
        """As `identity` where that costs nothing, else in place of hashes the files' sizes and times of change.

        It tells whether a folder is still what it was a while ago, on this machine; it has no place in what is kept.
        """
        if self.made_from is not None or self.weights.manifest is not None:
            return self.identity
        states = {path.name: path.stat() for path in self._content_files}
        files = {name: f"{state.st_size} bytes, changed {state.st_mtime_ns}" for name, state in states.items()}
        return {"files": files} | self._named

    @property
    def _content_files(self) -> list[Path]:
        return sorted([self.path / "config.json", *self.weights.shards], key=lambda path: path.name)

    @property
    def _named(self) -> dict[str, Any]:
        named = {"repo": self.repo or self.hub_name, "revision": self.revision, "quantization": self.quantization}
        return {key: value for key, value in named.items() if value is not None}

    @property
    def quantization(self) -> str | None:
        """The 4-bit type of the weights, "nf4" or "fp4"; None for a 16-bit checkpoint."""
        settings = self.config.get("quantization_config")
        return settings.get("bnb_4bit_quant_type", "fp4") if isinstance(settings, dict) else None

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files from which tokenizers are made, in a fixed order."""
        return [path for path in self.weights.carried_files() if path.name.startswith(_TOKENIZER)]

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder says how it wants conversations to be written."""
        config = self.path / "tokenizer_config.json"
        inside = config.is_file() and "chat_template" in read_object(config)
        return inside or any(self.path.glob("chat_template.*"))

    @property
    def hub_name(self) -> str | None:
        """The Hub id of this model, or of the one it was made from, where it is known."""
        if self.repo is not None:
            return self.repo
        manifest = self.weights.manifest
        source = manifest.inputs.get("source") if manifest is not None else None
        repo = source.get("repo") if isinstance(source, dict) else None
        return repo if isinstance(repo, str) else None


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
        """Open what a name was resolved to; DataError where it is a 4-bit store."""
        if is_store(found.path):
            raise DataError(f"{found.path} is already a 4-bit store; name the 16-bit checkpoint it was made from.")
        return cls(found.path, CheckpointFolder.open(found.path, load=load), found.repo, found.revision)

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


def note_network(path: Path, load: Load, note: Callable[[str], None]) -> None:
    """Tell `note` if files are to be mapped that lie on a network disk."""
    mount = network_mount(path) if load == "mmap" else None
    if mount is not None:
        note(
            f"{path} lies on {mount.point}, a network disk ({mount.kind}), where mapped files are slow and a lost"
            " connection kills the process: --load read reads them instead."
        )


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
        manifest = self.folder.manifest
        trained_on = None if manifest is None else manifest.inputs.get("base")
        return not isinstance(trained_on, dict) or all(
            trained_on[key] == base.identity.get(key) for key in _CONTENT if key in trained_on
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
