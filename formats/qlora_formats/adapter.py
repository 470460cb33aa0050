"""PEFT's LoRA adapters, read and written: adapter_config.json, adapter_model.safetensors, README.md.

The tensors are `base_model.model.<module path>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r].
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from qlora_formats.adapter_config import AdapterConfig
from qlora_formats.checkpoint import require_folder
from qlora_formats.commit import PartialFolder
from qlora_formats.errors import FormatError
from qlora_formats.folder import has_file
from qlora_formats.loading import Load
from qlora_formats.manifest import Manifest
from qlora_formats.strict_json import pretty
from qlora_formats.tensorfile import TensorFile, TensorPlan, write_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CARD = "README.md"

_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
# What takes a few seconds.
_MAX_STEPS = 2**33
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation"}


class AdapterFolder:
    """An adapter whose config, header and shapes were checked. `modules` are the paths of the adapted layers."""

    def __init__(
        self, path: Path, *, config: AdapterConfig, file: TensorFile, modules: list[str], manifest: Manifest | None
    ) -> None:
        self.path = path
        self.config = config
        self.metadata = file.metadata
        self.manifest = manifest
        self.modules = modules
        self._file = file

    @classmethod
    def open(cls, path: Path, *, load: Load = "mmap") -> Self:
        """Check the folder `path`, against its manifest where it has one; FormatError says what is wrong with it.

        `load` says how its tensors come into memory later.
        """
        require_folder(path)
        if not has_file(path, ADAPTER_CONFIG):
            instead = "; it is a model" if (path / "config.json").is_file() else ""
            raise FormatError(f"{path} is not an adapter: it has no {ADAPTER_CONFIG}{instead}")
        if not has_file(path, ADAPTER_WEIGHTS):
            instead = (
                "; adapter_model.bin is a pickle, which is not read: load it with PEFT and save it as safetensors"
                if (path / "adapter_model.bin").is_file()
                else ""
            )
            raise FormatError(f"{path} holds no {ADAPTER_WEIGHTS}{instead}")
        config, file = AdapterConfig.read(path / ADAPTER_CONFIG), TensorFile.open(path / ADAPTER_WEIGHTS, load=load)
        manifest = Manifest.read_if_present(path, kinds=("adapter",))
        return cls(path, config=config, file=file, modules=_checked_modules(file, config), manifest=manifest)

    @property
    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A [r, in] and B [out, r] of each module, in the dtype it has, each as `TensorFile.tensor`."""
        return {
            module: (self._file.tensor(_key(module, "A")), self._file.tensor(_key(module, "B")))
            for module in self.modules
        }


def write_adapter(
    folder: PartialFolder,
    *,
    config: AdapterConfig,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    metadata: Mapping[str, str],
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write an adapter as PEFT does, in float32: weights, config and a model card. The caller finishes the folder.

    `metadata` is provenance that goes into the safetensors header, since unknown keys in the config break older PEFT.
    `facts` is what the journal and the manifest should remember about the weights.
    """
    tensors = {_key(module, side): pair[side == "B"] for module, pair in pairs.items() for side in "AB"}
    layout = [TensorPlan(key, torch.float32, tuple(tensors[key].shape)) for key in sorted(tensors)]
    with folder.create(ADAPTER_WEIGHTS) as stream:
        stream.facts.update(facts)
        write_tensors(stream, layout, lambda key: tensors[key].detach().float(), metadata={**metadata, "format": "pt"})
    folder.write(ADAPTER_CONFIG, pretty(config.to_json()))
    folder.write(MODEL_CARD, _model_card(config, n_modules=len(pairs)).encode())


def _key(module: str, side: str) -> str:
    return f"{_PREFIX}{module}.lora_{side}.weight"


def _checked_modules(file: TensorFile, config: AdapterConfig) -> list[str]:
    if not file.infos:
        raise FormatError(f"{file.path} holds no tensors: the adapter was saved without its weights, save it again")
    modules = set()
    for key, info in file.infos.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise FormatError(f"{file.path}: {key!r} is not read: {_why_unread(key)}")
        if info.dtype not in _FLOATS or len(info.shape) != 2:
            raise FormatError(f"{file.path}: {key!r} is not a matrix of float32, float16 or bfloat16")
        modules.add(match[1])
    if config.matching_steps(modules) > _MAX_STEPS:
        raise FormatError(
            f"{file.path}: the patterns of {ADAPTER_CONFIG} are too complex to be matched with {len(modules):,} modules"
        )
    for module in sorted(modules):
        a, b = file.infos.get(_key(module, "A")), file.infos.get(_key(module, "B"))
        if a is None or b is None:
            raise FormatError(f"{file.path}: module {module!r} has no lora_{'A' if a is None else 'B'}")
        r = config.rank(module)
        if (a.shape[0], b.shape[1]) != (r, r):
            raise FormatError(
                f"{file.path}: module {module!r} has A {list(a.shape)} and B {list(b.shape)}"
                f" where {ADAPTER_CONFIG} gives it rank {r}"
            )
    return sorted(modules)


def _why_unread(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "it belongs to DoRA, and plain LoRA is read"
    if "lora_embedding_" in key:
        return "it adapts an embedding, and only linear layers can be adapted"
    if key.endswith(".bias"):
        return "it is a trained bias, and plain LoRA is read"
    return f"it is no {_PREFIX}MODULE.lora_A.weight or lora_B.weight (a module saved in full?)"


def _model_card(config: AdapterConfig, *, n_modules: int) -> str:
    base = config.base_model_name_or_path or ""
    named = f'base_model: "{base}"\n' if _HUB_ID.fullmatch(base) else ""
    pipeline = _PIPELINES.get(config.task_type or "")
    tagged = f"pipeline_tag: {pipeline}\n" if pipeline else ""
    return (
        f"---\n{named}library_name: peft\n{tagged}tags:\n- lora\n---\n\n# LoRA adapter\n\n"
        f"Rank {config.r}, alpha {config.lora_alpha:g}, on {n_modules} linear layers, in PEFT's layout.\n"
    )
