"""Merge: a base and an adapter become one plain checkpoint, a tensor at a time."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor

from qlora_formats.checkpoint import write_checkpoint
from qlora_formats.commit import commit_folder
from qlora_formats.hashing import hash_file
from qlora_formats.manifest import Manifest
from qlora_formats.store import StoredWeight
from qlora_formats.target import finished, require_space
from qlora_formats.tensorfile import TensorPlan
from qlora_kernels.dispatch import dequantize
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint, missing_part
from qlora_pipe.config import MergeConfig
from qlora_pipe.data.templates import TEMPLATE_FILE
from qlora_pipe.errors import DataError
from qlora_pipe.nn.adapt import check_fit
from qlora_pipe.nn.linear import quantized_tensor
from qlora_pipe.plugins import find_architecture
from qlora_pipe.stages.load import DTYPES, note_slow_kernels, require_weight_type

# Settings that the merged weights do not follow from.
_FREE = ("min_retention", "load")

# Elements whose products are summed at once: bounds what the measurement of a large weight costs in memory.
_PIECE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """A merged checkpoint, and how much of the adapter is in it."""

    path: Path
    already_done: bool
    retention: dict[str, float | None]
    """Per adapted layer: <merged - base, delta> / <delta, delta>; None where the adapter changes nothing."""

    @property
    def summary(self) -> str:
        """One line for the user."""
        kept = [share for share in self.retention.values() if share is not None]
        least = f", at least {min(kept):.1%} of the adapter kept in every layer" if kept else ""
        state = "already done, " if self.already_done else ""
        return f"{state}{len(self.retention)} layers merged{least}"


def merge(
    base: Checkpoint | QuantizedCheckpoint,
    adapter: Adapter,
    out: Path,
    config: MergeConfig,
    *,
    manager: pluggy.PluginManager,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
    note: Callable[[str], None] = lambda _: None,
) -> MergeResult:
    """Write base + scale * B A to `out`: summed in float32, rounded once to the data type asked for.

    A 4-bit base is dequantised first: what was trained is what ships. `progress` is told the bytes that are merged, and
    those there are. Raises DataError where the adapter does not fit,
    where a value is too large for the data type, or where rounding would lose more of the adapter than `min_retention`
    allows; ExistsError (as CommitError) where `out` holds something else.
    """
    architecture = find_architecture(manager, base.config.get("model_type"), config=base.config)
    ties = architecture.ties_of(base.config, base.weights.names)
    settings = {key: value for key, value in asdict(config).items() if key not in _FREE}
    inputs = {"base": base.identity, "adapter": adapter.identity, "settings": settings}
    template = adapter.path / TEMPLATE_FILE
    if template.is_file():
        inputs["chat_template"] = {"sha256": {TEMPLATE_FILE: hash_file(template).sha256}}
    if (done := finished(out, kind="checkpoint", inputs=inputs)) is not None:
        return _result(out, done, already_done=True)
    if (fault := missing_part(base, adapter)) is not None:
        note(fault)
    elif not adapter.fits_content_of(base):
        note("the adapter was trained on another base than the one it is merged into: the result is another model.")
    note_slow_kernels(torch.device("cpu"), note)
    names = [name for name in base.weights.names if name not in ties]
    pairs, retention, seen = adapter.folder.pairs, dict[str, float | None](), set[str]()
    check_fit(pairs, {name.removesuffix(".weight"): base.shape(name) for name in names if name.endswith(".weight")})

    def produce(name: str) -> Tensor:
        dense = _dense(base, name)
        path = name.removesuffix(".weight")
        pair = pairs.get(path) if name.endswith(".weight") else None
        if pair is None:
            return _rounded(dense, config.dtype, name=name)
        delta = adapter.folder.config.scale(path) * (pair[1].float() @ pair[0].float())
        merged = _rounded(dense + delta, config.dtype, name=name)
        retention[path] = _retention(merged, dense, delta)
        share = retention[path]
        if share is not None and share < config.min_retention:
            raise DataError(
                f"{path}: rounding to {config.dtype} would keep {share:.1%} of the adapter, less than"
                f" {config.min_retention:.0%}. Merge with a wider --dtype, or go on with --min-retention 0."
            )
        return merged

    plans = [TensorPlan(name, DTYPES[config.dtype], base.shape(name)) for name in names]
    sizes = {plan.name: plan.n_bytes for plan in plans}
    through, total = 0, sum(sizes.values())

    def produce_counted(name: str) -> Tensor:
        nonlocal through
        result = produce(name)
        seen.add(name)
        through += sizes[name]
        progress("merge", through, total)
        return result

    with commit_folder(out, kind="checkpoint", inputs=inputs) as work:
        written = sum(record.bytes for record in work.done.values())
        require_space(out, needed=total - written)
        write_checkpoint(
            work, config=_plain_config(base, config.dtype), tensors=plans, produce=produce_counted,
            shard_mib=config.shard_mib,
        )  # fmt: skip
        # Shards of an interrupted merge were not made by this process; what they keep is measured all the same.
        for name in names:
            if name not in seen:
                produce_counted(name)
        carried = {file.name: file for file in base.weights.carried_files()}
        if template.is_file():
            # The adapter was trained on what this one writes, which need not be the base's own.
            carried[TEMPLATE_FILE] = template
        for name, file in sorted(carried.items()):
            work.copy(file, name)
        manifest = work.finish({"retention": {path: _six_digits(share) for path, share in retention.items()}})
    return _result(out, manifest, already_done=False)


def _dense(base: Checkpoint | QuantizedCheckpoint, name: str) -> Tensor:
    """One weight in float32."""
    stored = base.weights.tensor(name) if isinstance(base, Checkpoint) else base.weights.weight(name)
    if isinstance(stored, StoredWeight):
        return dequantize(quantized_tensor(stored, name=name), torch.float32)
    require_weight_type(stored.dtype, name=name)
    return stored.float()


def _rounded(exact: Tensor, dtype: str, *, name: str) -> Tensor:
    """Round a weight once; DataError naming it where the result is not finite."""
    result = exact.to(DTYPES[dtype])
    if not bool(torch.isfinite(result).all()):
        fault = f"would hold values that {dtype} does not" if bool(torch.isfinite(exact).all()) else "is not finite"
        raise DataError(f"{name} {fault}; merge with a wider --dtype, or look into the base and the adapter.")
    return result


def _retention(merged: Tensor, base: Tensor, delta: Tensor) -> float | None:
    kept = size = 0.0
    for m, b, d in zip(*(torch.split(part.flatten(), _PIECE) for part in (merged, base, delta)), strict=True):
        exact = d.double()
        kept += float(((m.double() - b.double()) * exact).sum())
        size += float((exact * exact).sum())
    return kept / size if size else None


def _six_digits(share: float | None) -> float | None:
    return None if share is None else float(f"{share:.6g}")


def _plain_config(base: Checkpoint | QuantizedCheckpoint, dtype: str) -> dict[str, Any]:
    """The base's config without its quantisation, in the merged data type, under the key it came with."""
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}


def _result(out: Path, manifest: Manifest, *, already_done: bool) -> MergeResult:
    return MergeResult(path=out, already_done=already_done, retention=manifest.fields["retention"])
