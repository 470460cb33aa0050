"""Quantize: a 16-bit checkpoint becomes a 4-bit store, a tensor at a time."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor

from qlora_formats.commit import commit_folder
from qlora_formats.layout import StorePlan
from qlora_formats.manifest import Manifest
from qlora_formats.store import StoredWeight, write_store
from qlora_formats.target import finished, require_space
from qlora_kernels.blockwise import dequantize_reference
from qlora_kernels.blockwise import quantize as quantize_tensor
from qlora_pipe.architecture import block_of, matches
from qlora_pipe.artifacts import Checkpoint
from qlora_pipe.config import QuantizeConfig
from qlora_pipe.errors import DataError
from qlora_pipe.plugins import find_architecture

# Elements whose squared error is summed at once: bounds what a large tensor's error costs in memory.
_PIECE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """A finished store, and what its manifest says of it."""

    path: Path
    already_done: bool
    manifest: Manifest

    @property
    def summary(self) -> str:
        """One line for the user."""
        totals = self.manifest.fields["totals"]
        size = f"{totals['source_bytes'] / 1e6:,.1f} MB -> {totals['bytes'] / 1e6:,.1f} MB"
        state = "already done, " if self.already_done else ""
        return f"{state}{totals['quantized']} of {totals['tensors']} tensors in 4 bits, {size}"


def quantize(
    source: Checkpoint,
    out: Path,
    config: QuantizeConfig,
    *,
    manager: pluggy.PluginManager,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> QuantizeResult:
    """Write the 4-bit store of `source` to the folder `out`.

    Interrupted and called again it goes on after the last finished shard, and ends with the same bytes. Raises
    ExistsError (as CommitError) where `out` holds something else, DataError naming a tensor with NaN or infinity.
    """
    architecture = find_architecture(manager, source.config.get("model_type"))
    inputs = {"source": source.identity, "settings": asdict(config)}
    if (done := finished(out, kind="store", inputs=inputs)) is not None:
        return QuantizeResult(path=out, already_done=True, manifest=done)
    ties = architecture.ties(source.config)
    names = [name for name in source.weights.names if name not in ties]
    infos = {name: source.weights.info(name) for name in names}

    def group_of(name: str) -> str | None:
        block = block_of(name, architecture.blocks)
        return None if block is None else f"{block}."

    plan = StorePlan.of(
        [(name, info.dtype, info.shape) for name, info in infos.items()],
        block_of=group_of,
        is_quantized=lambda name: matches(name, architecture.quantize),
        kind=config.type,
        block_size=config.block_size,
        double_quant=config.double_quant,
        skip_modules=architecture.keep_16bit,
    )
    quantized = [weight for weight in plan.weights if weight.quantized]
    if not quantized:
        raise DataError(f"{source.path.name} holds no weight that the {architecture.name} plugin would quantise.")
    facts: dict[str, dict[str, Any]] = {}
    seen = 0

    def produce(name: str) -> StoredWeight | Tensor:
        nonlocal seen
        seen += 1
        progress("quantize", seen, len(names))
        weight = source.weights.tensor(name)
        if not matches(name, architecture.quantize):
            return weight
        stored, error = _quantized(weight, config, name=name)
        facts[name] = {"relative_error": error}
        return stored

    source_bytes = sum(info.end - info.start for info in infos.values())
    # 4.13 bits are left of 16 or 32; what stays as it is counts in full.
    needed = sum(
        (info.end - info.start) if not matches(name, architecture.quantize) else -(-_elements(info.shape) * 5 // 8)
        for name, info in infos.items()
    )
    with commit_folder(out, kind="store", inputs=inputs) as work:
        require_space(out, needed=needed - sum(record.bytes for record in work.done.values()))
        write_store(
            work,
            config=source.config,
            plan=plan,
            produce=produce,
            facts=lambda name: facts.pop(name, {}),
            shard_mib=config.shard_mib,
        )
        for file in source.weights.carried_files():
            work.copy(file, file.name)
        totals = {
            "tensors": len(names),
            "quantized": len(quantized),
            "source_bytes": source_bytes,
            "bytes": sum(record.bytes for name, record in work.done.items() if name.endswith(".safetensors")),
        }
        manifest = work.finish({"totals": totals})
    return QuantizeResult(path=out, already_done=False, manifest=manifest)


def _elements(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _quantized(weight: Tensor, config: QuantizeConfig, *, name: str) -> tuple[StoredWeight, float]:
    """Quantise one weight; give what is stored and its relative error, |W - Q(W)| / |W|, to four digits."""
    try:
        q = quantize_tensor(weight, kind=config.type, block_size=config.block_size, double_quant=config.double_quant)
    except ValueError as fault:
        raise DataError(f"{name}: {fault}.") from fault
    stored = StoredWeight(**q._asdict(), kind=config.type, dtype=weight.dtype)
    return stored, relative_error(weight, dequantize_reference(q, torch.float32))


def relative_error(exact: Tensor, approximate: Tensor) -> float:
    """|exact - approximate| / |exact| over all elements, summed in float64, to four digits; 0 for all zeros."""
    error = size = 0.0
    for a, b in zip(torch.split(exact.flatten(), _PIECE), torch.split(approximate.flatten(), _PIECE), strict=True):
        a64, b64 = a.double(), b.double()
        error += float((a64 - b64).square().sum())
        size += float(a64.square().sum())
    return float(f"{(error / size) ** 0.5:.4g}") if size else 0.0
