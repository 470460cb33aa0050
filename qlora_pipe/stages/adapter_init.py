"""The adapter to start from: what 4 bits have lost of a model, as far as a LoRA adapter can hold it.

LoftQ (Li et al., arXiv 2310.08659): per layer, the pair A, B of the adapter's rank that brings Q + B A closest to W. It
is found when source and store are both at hand, and lies beside the store as an adapter like any other.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import fsum
from pathlib import Path
from typing import Any, NamedTuple

import pluggy
import torch
from torch import Tensor

from qlora_formats.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CARD, write_adapter
from qlora_formats.commit import PartialFolder, commit_folder
from qlora_formats.manifest import Manifest
from qlora_formats.store import StoredWeight
from qlora_formats.target import finished, require_space
from qlora_formats.tensorfile import TensorFile, TensorPlan, write_tensors
from qlora_kernels.dispatch import dequantize
from qlora_kernels.loftq import squared_norm, starting_pair
from qlora_kernels.one_thread import one_thread
from qlora_pipe.architecture import Architecture, block_of, matches
from qlora_pipe.artifacts import Checkpoint, QuantizedCheckpoint
from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.model import content_of
from qlora_pipe.nn.adapt import adaptable, describe_adapter
from qlora_pipe.nn.linear import quantized_tensor
from qlora_pipe.plugins import find_architecture

METHOD = "loftq"
MOST_ITERATIONS = 100

_SETTING = re.compile(rf"{METHOD}(?::([1-9][0-9]{{0,8}}))?")


class AdapterInit(NamedTuple):
    """How the adapter beside a store is found. With more than one iteration the store itself is made to suit it."""

    iterations: int

    @property
    def changes_the_base(self) -> bool:
        """Whether the store is another one than without this setting."""
        return self.iterations > 1

    def binding(self, rank: int) -> dict[str, Any]:
        """What the manifest of such a store says, as its field `bound_adapter`."""
        return {"method": METHOD, "rank": rank, "iterations": self.iterations}


def parse_adapter_init(text: str) -> AdapterInit:
    """Read the setting `loftq` or `loftq:ITERATIONS`; ConfigError says what it takes."""
    found = _SETTING.fullmatch(text)
    iterations = int(found[1] or 1) if found else 0
    if not 1 <= iterations <= MOST_ITERATIONS:
        raise ConfigError(
            f"adapter_init takes {METHOD} or {METHOD}:N with N iterations from 1 to {MOST_ITERATIONS},"
            f" and was given {text[:40]!r}."
        )
    return AdapterInit(iterations)


def is_adapted(name: str, architecture: Architecture) -> bool:
    """Whether the layer of the weight `name` gets an adapter."""
    return name.endswith(".weight") and matches(name.removesuffix(".weight"), architecture.adapt)


def adapter_folder(store: Path) -> Path:
    """Where the adapter lies that belongs to the store in the folder `store`."""
    return store.with_name(f"{store.name}-{METHOD}")


@dataclass(frozen=True, kw_only=True)
class InitialAdapter:
    """A finished adapter, and what its manifest says of it."""

    path: Path
    already_done: bool
    errors: dict[str, tuple[float, float]]
    """Per layer |W - Q| / |W| and |W - Q - B A| / |W|."""

    @property
    def summary(self) -> str:
        """One line for the user."""
        before, after = (fsum(column) / len(self.errors) for column in zip(*self.errors.values(), strict=True))
        state = "already done, " if self.already_done else ""
        return f"{state}an adapter to start from: mean error of {len(self.errors)} layers {before:.2%} -> {after:.2%}"


def write_initial_adapter(
    source: Checkpoint,
    store: QuantizedCheckpoint,
    out: Path,
    *,
    rank: int,
    manager: pluggy.PluginManager,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> InitialAdapter:
    """Write to `out` the adapter that brings `store` closest to the `source` that it was made from.

    Its scale is 1. One weight is in memory at a time; `progress` is told the source's bytes that are through, and those
    there are. Interrupted and called again it goes on after the last finished block, and ends with the same bytes,
    whatever the number of threads. Raises DataError where the store was made from another source, ConfigError where the
    family names nothing to adapt, ExistsError (as CommitError) where `out` holds something else.
    """
    architecture = find_architecture(manager, store.config.get("model_type"), config=store.config)
    _require_made_from(source, store)
    inputs = {"base": store.identity, "settings": {"method": METHOD, "rank": rank}}
    if (done := finished(out, kind="adapter", inputs=inputs)) is not None:
        return _result(out, done, already_done=True)
    with torch.device("meta"):
        layers = adaptable(architecture.build(store.config), architecture)
    described = describe_adapter(layers, architecture, rank=rank, alpha=float(rank), dropout=0.0)
    described = replace(described, base_model_name_or_path=store.hub_name)
    blocks: dict[str | None, list[str]] = {}
    for layer in layers:
        blocks.setdefault(block_of(layer, architecture.blocks), []).append(layer)
    parts = {f"part-{number:05}.safetensors": block for number, block in enumerate(blocks.values(), start=1)}
    infos = {layer: source.weights.info(f"{layer}.weight") for layer in layers}
    source_bytes = {layer: info.end - info.start for layer, info in infos.items()}
    through, total = 0, sum(source_bytes.values())

    def pair(layer: str) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
        nonlocal through
        found = _pair(source, store, f"{layer}.weight", rank=rank)
        source.weights.release(f"{layer}.weight")
        through += source_bytes[layer]
        progress("adapter", through, total)
        return found

    with commit_folder(out, kind="adapter", inputs=inputs) as work:
        # The parts may go only when nothing is made from them any more.
        if not work.done.keys() >= {ADAPTER_WEIGHTS, ADAPTER_CONFIG, MODEL_CARD}:
            needed = sum(4 * rank * sum(info.shape) for info in infos.values())
            # Parts and the adapter made of them lie side by side for a moment.
            require_space(out, needed=2 * needed - sum(record.bytes for record in work.done.values()))
            for name, block in parts.items():
                if name in work.done:
                    through += sum(source_bytes[layer] for layer in block)
                else:
                    _write_part(work, name, block, pair)
            facts = {layer: error for name in parts for layer, error in work.done[name].facts["layers"].items()}
            write_adapter(
                work, config=described, pairs=_joined(work, parts), metadata={"method": METHOD}, facts={"layers": facts}
            )
        for name in parts:
            if name in work.done:
                work.discard(name)
        for file in store.tokenizer_files:
            work.copy(file, file.name)
        manifest = work.finish()
    return _result(out, manifest, already_done=False)


def _require_made_from(source: Checkpoint, store: QuantizedCheckpoint) -> None:
    manifest = store.weights.manifest
    named = content_of(manifest.inputs.get("source")) if manifest is not None else {}
    if not named or named != content_of(source.identity):
        raise DataError(
            f"{store.path.name} was not made from {source.path.name}, so what it has lost of that is not known:"
            f" run qlora-pipe quantize {source.path.name} OUT."
        )


def _write_part(
    work: PartialFolder,
    name: str,
    block: Iterable[str],
    pair: Callable[[str], tuple[tuple[Tensor, Tensor], tuple[float, float]]],
) -> None:
    found = {layer: pair(layer) for layer in block}
    tensors = {f"{layer}.{side}": ab["AB".index(side)] for layer, (ab, _) in found.items() for side in "AB"}
    layout = [TensorPlan(key, torch.float32, tuple(tensor.shape)) for key, tensor in tensors.items()]
    with work.create(name) as stream:
        stream.facts["layers"] = {layer: list(errors) for layer, (_, errors) in found.items()}
        write_tensors(stream, layout, lambda key: tensors[key])


def _joined(work: PartialFolder, parts: dict[str, list[str]]) -> dict[str, tuple[Tensor, Tensor]]:
    files = {name: TensorFile.open(work.path / name) for name in parts}
    return {
        layer: (files[name].tensor(f"{layer}.A"), files[name].tensor(f"{layer}.B"))
        for name, block in parts.items()
        for layer in block
    }


def _pair(
    source: Checkpoint, store: QuantizedCheckpoint, name: str, *, rank: int
) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """A [rank, in] and B [out, rank] of one weight, and its error without and with them."""
    exact, stored = source.weights.tensor(name), store.weights.weight(name)
    if isinstance(stored, StoredWeight):
        residual = dequantize(quantized_tensor(stored, name=name), torch.float32)
        torch.sub(exact, residual, out=residual)
    else:
        residual = exact.float() - stored.float()
    try:
        a, b = starting_pair(residual, rank=rank)
    except ValueError as fault:
        raise DataError(f"{name}: {fault}.") from fault
    size, before = squared_norm(exact), squared_norm(residual)
    with one_thread():
        after = squared_norm(residual.addmm_(b, a, alpha=-1))
    return (a, b), (relative_error(before, size), relative_error(after, size))


def relative_error(error: float, size: float) -> float:
    """|W - W'| / |W| to four digits from the squares of both norms; 0 for a weight of zeros."""
    return float(f"{(error / size) ** 0.5:.4g}") if size else 0.0


def _result(out: Path, manifest: Manifest, *, already_done: bool) -> InitialAdapter:
    known = manifest.files[ADAPTER_WEIGHTS].facts["layers"]
    errors = {layer: (before, after) for layer, (before, after) in known.items()}
    return InitialAdapter(path=out, already_done=already_done, errors=errors)
