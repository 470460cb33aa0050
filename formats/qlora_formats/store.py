"""The 4-bit store: bitsandbytes' serialised layout, read from any folder that has it."""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from qlora_formats.checkpoint import (
    CONFIG,
    CheckpointFolder,
    collector_paused,
    require_folder,
)
from qlora_formats.errors import FormatError
from qlora_formats.folder import has_file
from qlora_formats.loading import Load
from qlora_formats.manifest import Manifest
from qlora_formats.quant_state import (
    QuantState,
    components_of,
    parts_of,
    read_states,
    state_name,
)
from qlora_formats.strict_json import read_object
from qlora_formats.tensorfile import TensorPlan

_MIB = 2**20


class StoredWeight(NamedTuple):
    """One weight in 4 bits, as its tensors lie in the file.

    codes U8 [ceil(N/2)], the first weight in the high nibble; absmax U8 [S] under double quantization, else F32 [S],
    S = ceil(N / block_size); levels F32 [16]; nested_absmax F32 [ceil(S / nested_block_size)], nested_levels F32 [256]
    and offset F32 [] under double quantization, else None. `dtype` is the source's.
    """

    codes: Tensor
    absmax: Tensor
    levels: Tensor
    nested_absmax: Tensor | None
    nested_levels: Tensor | None
    offset: Tensor | None
    block_size: int
    nested_block_size: int
    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype


class Store:
    """A 4-bit folder, ours or one that transformers wrote, with every weight's JSON and sizes checked."""

    def __init__(self, folder: CheckpointFolder, states: Mapping[str, QuantState]) -> None:
        self._folder = folder
        self._states = states
        beside = {state_name(weight, state.kind) for weight, state in states.items()}
        beside.update(name for weight in states for name in components_of(weight))
        self.names = [name for name in folder.names if name not in beside]

    @classmethod
    def open(cls, path: Path, *, load: Load = "mmap") -> Self:
        """Check the folder `path`; FormatError names the file or the weight and the field that is wrong.

        No tensors are held: `weight` gives views of the mapped shards, or reads, as `load` says.
        """
        with collector_paused():
            folder = CheckpointFolder.open(path, load=load)
            if not _is_four_bit(folder.config):
                raise FormatError(
                    f"{path} is not a 4-bit checkpoint: {CONFIG} has no quantization_config of bitsandbytes"
                )
            states = read_states(folder)
            if not states:
                raise FormatError(f"{path} holds no weight in 4 bits, although its {CONFIG} says that it does")
            return cls(folder, states)

    @property
    def path(self) -> Path:
        return self._folder.path

    @property
    def config(self) -> dict[str, Any]:
        return self._folder.config

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._folder.generation_config

    @property
    def load(self) -> Load:
        return self._folder.load

    @property
    def manifest(self) -> Manifest | None:
        return self._folder.manifest

    @property
    def shards(self) -> list[Path]:
        return self._folder.shards

    def carried_files(self) -> list[Path]:
        """As `CheckpointFolder.carried_files`."""
        return self._folder.carried_files()

    def is_quantized(self, name: str) -> bool:
        """Whether the weight `name` is stored in 4 bits."""
        return name in self._states

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the weight itself, packed or not."""
        return self._states[name].shape if name in self._states else self._folder.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the source: what a packed weight was, what a kept one is."""
        return self._states[name].dtype if name in self._states else self._folder.info(name).dtype

    def kind(self, name: str) -> str:
        """The 4-bit type of a quantised weight, "nf4" or "fp4"."""
        return self._states[name].kind

    def bits(self, name: str) -> float:
        """Bits per weight of a quantised weight, its scales included: what grows with its size."""
        parts = parts_of(name, self._states[name])
        counted = [part for part in (parts.codes, parts.absmax, parts.nested_absmax) if part is not None]
        return 8 * sum(part.n_bytes for part in counted) / prod(self.shape(name))

    def parts(self, name: str) -> dict[str, str]:
        """The names of the tensors that a weight is stored in, by their fields in StoredWeight.

        A kept weight is one tensor, itself: {"tensor": name}.
        """
        if (state := self._states.get(name)) is None:
            return {"tensor": name}
        found = parts_of(name, state)._asdict()
        return {field: plan.name for field, plan in found.items() if plan is not None}

    @property
    def folder(self) -> CheckpointFolder:
        """The folder as what it holds: tensors by the names that `parts` gives."""
        return self._folder

    def weight(self, name: str, *, part: Callable[[str], Tensor] | None = None) -> StoredWeight | Tensor:
        """One weight as views of the mapped file, or read; FormatError if there is none of that name.

        `part` gives the tensors of `parts`, for those who hold the bytes elsewhere.
        """
        tensor = part or self._folder.tensor
        state = self._states.get(name)
        if state is None:
            return tensor(name)
        parts = parts_of(name, state)

        def view(plan: TensorPlan | None) -> Tensor | None:
            return None if plan is None else tensor(plan.name)

        return StoredWeight(
            codes=tensor(name).flatten().view(torch.uint8),
            absmax=tensor(parts.absmax.name),
            levels=tensor(parts.levels.name),
            nested_absmax=view(parts.nested_absmax),
            nested_levels=view(parts.nested_levels),
            offset=None if state.nested_offset is None else torch.tensor(state.nested_offset, dtype=torch.float32),
            block_size=state.block_size,
            nested_block_size=state.nested_block_size or 0,
            shape=state.shape,
            kind=state.kind,
            dtype=state.dtype,
        )


def is_store(path: Path) -> bool:
    """Whether the folder's config.json says that bitsandbytes quantised it to 4 bits; FormatError if it is no model."""
    require_folder(path)
    return has_file(path, CONFIG) and _is_four_bit(read_object(path / CONFIG))


def _is_four_bit(config: Mapping[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return (
        isinstance(quantization, dict)
        and quantization.get("quant_method") == "bitsandbytes"
        and quantization.get("load_in_4bit") is True
    )
