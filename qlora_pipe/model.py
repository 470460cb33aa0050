"""What every model folder has in common, 16-bit or 4-bit: where it lies, what it holds, and which model it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from qlora_formats.checkpoint import CheckpointFolder
from qlora_formats.hashing import hash_files
from qlora_formats.loading import Load, network_mount
from qlora_formats.store import Store
from qlora_pipe.hub import Resolved, resolve

# The parts of an identity that say what the weights are.
_CONTENT = ("manifest", "sha256")
_TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece", "chat_template")


def content_of(identity: Any) -> dict[str, Any]:
    """What a recorded identity says of the weights alone: the same wherever they were fetched from."""
    return {key: identity[key] for key in _CONTENT if key in identity} if isinstance(identity, dict) else {}


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
            content: dict[str, Any] = {"sha256": dict(self.made_from)}
        elif self.weights.manifest is not None:
            content = {"manifest": self.weights.manifest.digest}
        else:
            found = hash_files(self._content_files, mapped=self.weights.load == "mmap", progress=progress)
            content = {"sha256": {path.name: found[path].sha256 for path in found}}
        # Where the cached property looks, so that nothing is hashed twice.
        vars(self)["identity"] = content | self._named
        return self.identity

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
    def hub_name(self) -> str | None:
        """The Hub id of this model, or of the one it was made from, where it is known."""
        if self.repo is not None:
            return self.repo
        manifest = self.weights.manifest
        source = manifest.inputs.get("source") if manifest is not None else None
        repo = source.get("repo") if isinstance(source, dict) else None
        return repo if isinstance(repo, str) else None


def note_network(path: Path, load: Load, note: Callable[[str], None]) -> None:
    """Tell `note` if files are to be mapped that lie on a network disk."""
    mount = network_mount(path) if load == "mmap" else None
    if mount is not None:
        note(
            f"{path} lies on {mount.point}, a network disk ({mount.kind}), where mapped files are slow and a lost"
            " connection kills the process: --load read reads them instead."
        )
