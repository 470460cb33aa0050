"""Quantize: a 16-bit checkpoint becomes a 4-bit store, a few tensors at a time.

The source is mapped. Threads quantise the weights that come next while one is written, and another thread hashes the
source's files beside them, which on a cold disk is what reads ahead.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import pluggy
import torch
from torch import Tensor

from qlora_formats.commit import commit_folder
from qlora_formats.errors import FormatError
from qlora_formats.journal import survey
from qlora_formats.layout import StorePlan
from qlora_formats.manifest import FileRecord, Manifest
from qlora_formats.store import StoredWeight
from qlora_formats.store_writing import write_store
from qlora_formats.target import finished, partial_path, require_space
from qlora_formats.tensorfile import TensorInfo
from qlora_kernels.dispatch import squared_error
from qlora_kernels.loftq import loftq_quantize
from qlora_pipe.architecture import block_of
from qlora_pipe.artifacts import Checkpoint, QuantizedCheckpoint
from qlora_pipe.config import QuantizeConfig
from qlora_pipe.errors import DataError
from qlora_pipe.plugins import find_architecture
from qlora_pipe.precision import choose_precision
from qlora_pipe.stages.adapter_init import (
    AdapterInit,
    InitialAdapter,
    adapter_folder,
    is_adapted,
    parse_adapter_init,
    relative_error,
    write_initial_adapter,
)
from qlora_pipe.stages.load import note_slow_kernels

# The weights that are being made or wait to be written have at most so many bytes in the source: twice those of the
# largest, so that one can be made while another is written, whatever their size.
_LEAST_AHEAD_BYTES = 128 * 2**20
# Kernels use every core by themselves; the second thread is for what they leave to one, digests above all.
_THREADS = 2
# Settings that decide nothing about the bytes (how the source is opened), or not by their words (what is kept is named
# tensor by tensor).
_NOT_BY_THEIR_WORDS = ("allow_pickle", "load", "keep")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """A finished store, what its manifest says of it, and the adapter to start from, if one was asked for."""

    path: Path
    already_done: bool
    manifest: Manifest
    adapter: InitialAdapter | None = None

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
    progress: Progress = lambda _what, _done, _total: None,
    note: Callable[[str], None] = lambda _: None,
) -> QuantizeResult:
    """Write the 4-bit store of `source` to the folder `out`, and an adapter to start from beside it if asked to.

    Interrupted and called again it goes on after the last finished shard, and ends with the same bytes. Memory holds a
    few tensors, whatever the model. `progress` is told the source's bytes that are through, and those there are; `note`
    takes sentences for the user. Raises ExistsError (as CommitError) where `out` holds something else, DataError naming
    a tensor with NaN or infinity, and where the source changed meanwhile.
    """
    note_slow_kernels(torch.device("cpu"), note)
    init = parse_adapter_init(config.adapter_init) if config.adapter_init is not None else None
    done = _write_store(source, out, config, init, manager=manager, progress=progress)
    if init is None:
        return done
    adapter = write_initial_adapter(
        source, QuantizedCheckpoint.open(out), adapter_folder(out), rank=config.adapter_rank, manager=manager,
        progress=progress,
    )  # fmt: skip
    return replace(done, adapter=adapter)


def _write_store(
    source: Checkpoint,
    out: Path,
    config: QuantizeConfig,
    init: AdapterInit | None,
    *,
    manager: pluggy.PluginManager,
    progress: Progress,
) -> QuantizeResult:
    model_type = source.config.get("model_type")
    architecture = find_architecture(manager, model_type, config=source.config)
    ties = architecture.ties_of(source.config, source.weights.names)
    infos = {name: source.weights.info(name) for name in source.weights.names if name not in ties}
    # Pickles are not read only to be compared with a store that is there; the store tells what tensors they hold.
    names = infos or _tensors_in(out)
    precision = choose_precision(
        names,
        architecture,
        model_type=str(model_type),
        kind=config.type,
        keep=config.keep if names else (),
        manager=manager,
    )
    bound = init is not None and init.changes_the_base
    # An adapter to an ordinary store can be had at any time, so the store does not depend on it.
    free = _NOT_BY_THEIR_WORDS if bound else (*_NOT_BY_THEIR_WORDS, "adapter_init", "adapter_rank")
    settings = {key: value for key, value in asdict(config).items() if key not in free}
    others = {"kept": sorted(precision.kept), "quantized_besides": sorted(precision.besides)}
    decided = {"settings": settings} | {what: tensors for what, tensors in others.items() if tensors}
    # Hashing reads the whole source. It comes first only where something is to be compared with its content.
    by_content = out.exists() or _is_begun_by_content(out)
    inputs = {"source": source.identity if by_content else source.stamp} | decided
    if (done := finished(out, kind="store", inputs=inputs)) is not None:
        return QuantizeResult(path=out, already_done=True, manifest=done)
    if not precision.quantized:
        raise DataError(f"{source.path.name} holds no weight that the {architecture.name} plugin would quantise.")

    quantized = frozenset(precision.quantized)

    def group_of(name: str) -> str | None:
        block = block_of(name, architecture.blocks)
        return None if block is None else f"{block}."

    plan = StorePlan.of(
        [(name, info.dtype, info.shape) for name, info in infos.items()],
        block_of=group_of,
        is_quantized=quantized.__contains__,
        kind=config.type,
        block_size=config.block_size,
        double_quant=config.double_quant,
        skip_modules=precision.skip_modules,
    )
    with commit_folder(out, kind="store", inputs=inputs) as work, _hashed_beside(source) as hashed:
        written = sum(record.bytes for record in work.done.values())
        require_space(out, needed=_needed_bytes(infos, quantized=quantized) - written)
        source_bytes = sum(info.end - info.start for info in infos.values())
        through = source_bytes - _missing_bytes(infos, done=work.done)
        progress("quantize", through, source_bytes)
        facts: dict[str, dict[str, Any]] = {}

        def produce(name: str) -> StoredWeight | Tensor:
            weight = source.weights.tensor(name)
            if name not in quantized:
                return weight
            iterations = init.iterations if init is not None and is_adapted(name, architecture) else 1
            stored, error = _quantized(weight, config, name=name, iterations=iterations)
            facts[name] = {"relative_error": error}
            return stored

        def count(name: str) -> None:
            nonlocal through
            source.weights.release(name)
            through += infos[name].end - infos[name].start
            progress("quantize", through, source_bytes)

        write_store(
            work,
            config=source.config,
            plan=plan,
            produce=produce,
            facts=lambda name: facts.pop(name, {}),
            written=count,
            shard_mib=config.shard_mib,
            # The rounds of an adapter's search take several times the memory of a weight: one at a time.
            ahead_bytes=0 if bound else max(_LEAST_AHEAD_BYTES, 2 * max(i.end - i.start for i in infos.values())),
            threads=1 if bound else _THREADS,
        )
        for file in source.weights.carried_files():
            work.copy(file, file.name)
        totals = {
            "tensors": len(infos),
            "quantized": len(precision.quantized),
            "source_bytes": source_bytes,
            "bytes": sum(record.bytes for name, record in work.done.items() if name.endswith(".safetensors")),
        }
        identity = hashed.result()
        if not by_content and source.stamp != inputs["source"]:
            raise DataError(
                f"{source.path} was changed while it was quantised: find out by whom, delete {work.path} and run again."
            )
        binding = {"bound_adapter": init.binding(config.adapter_rank)} if init is not None and bound else {}
        manifest = work.finish({"totals": totals, **binding}, inputs={"source": identity} | decided)
    return QuantizeResult(path=out, already_done=False, manifest=manifest)


def _tensors_in(out: Path) -> list[str]:
    """The tensors that a finished store lists, none where there is no such store."""
    try:
        manifest = Manifest.read_if_present(out)
    except FormatError:
        # Whoever compares with it will say what is wrong.
        manifest = None
    files = {} if manifest is None else manifest.files
    return [name for record in files.values() for name in record.facts.get("tensors", {})]


def _is_begun_by_content(out: Path) -> bool:
    """Whether an unfinished store names its source by hashes: then only its last steps are missing."""
    partial = partial_path(out)
    begun = survey(partial) if partial.is_dir() else None
    return begun is not None and "files" not in begun.inputs.get("source", {})


class _Left(Exception):
    """Nobody waits for the hashes any more."""


@contextmanager
def _hashed_beside(source: Checkpoint) -> Iterator[Future[dict[str, Any]]]:
    """Find out the source's identity in the background; whoever leaves early doesn't wait for it."""
    left = Event()

    def go_on(_done: int, _total: int) -> None:
        if left.is_set():
            raise _Left

    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        try:
            yield pool.submit(source.identified, progress=go_on)
        finally:
            left.set()


def _needed_bytes(infos: Mapping[str, TensorInfo], *, quantized: Collection[str]) -> int:
    """What the store will take at most: 5 bits are left of each quantised weight, what is kept counts in full."""

    def needed(name: str, info: TensorInfo) -> int:
        size = info.end - info.start
        return -(-size // info.dtype.itemsize * 5 // 8) if name in quantized else size

    return sum(needed(name, info) for name, info in infos.items())


def _missing_bytes(infos: Mapping[str, TensorInfo], *, done: Mapping[str, FileRecord]) -> int:
    """The source's bytes of the tensors that no finished shard holds."""
    there = {name for record in done.values() for name in record.facts.get("tensors", {})}
    return sum(info.end - info.start for name, info in infos.items() if name not in there)


def _quantized(weight: Tensor, config: QuantizeConfig, *, name: str, iterations: int) -> tuple[StoredWeight, float]:
    """Quantise one weight; give what is stored and its relative error, |W - Q(W)| / |W|, to four digits."""
    try:
        q = loftq_quantize(
            weight,
            kind=config.type,
            block_size=config.block_size,
            double_quant=config.double_quant,
            rank=config.adapter_rank,
            iterations=iterations,
        )
    except ValueError as fault:
        raise DataError(f"{name}: {fault}.") from fault
    error, size = squared_error(weight, q)
    return StoredWeight(**q._asdict(), kind=config.type, dtype=weight.dtype), relative_error(error, size)
