"""Inspect: say what a folder is, from its headers alone."""

import json
import math
from typing import Any

from qlora_formats.adapter import ADAPTER_CONFIG
from qlora_formats.manifest import Manifest
from qlora_formats.store import is_store
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint, Run
from qlora_pipe.hub import resolve
from qlora_pipe.settings import read_yaml
from qlora_pipe.train.checkpoint import checkpoints


def inspect(name: str) -> dict[str, Any]:
    """Describe a store, a checkpoint, an adapter or a run, by folder or Hub id; no tensor is read.

    Raises MissingInputError or FormatError, as opening it does.
    """
    found = resolve(name)
    if Run.is_run(found.path):
        return _run(Run(found.path))
    if (found.path / ADAPTER_CONFIG).is_file():
        return _adapter(Adapter.at(found))
    if is_store(found.path):
        return _store(QuantizedCheckpoint.at(found))
    return _checkpoint(Checkpoint.at(found))


def _checkpoint(found: Checkpoint) -> dict[str, Any]:
    infos = {name: found.weights.info(name) for name in found.weights.names}
    tensors = [
        {"name": name, "shape": list(info.shape), "type": _name(info.dtype), "bits": 8.0 * info.dtype.itemsize}
        for name, info in infos.items()
    ]
    return _common(found, "checkpoint") | _sizes(tensors) | _made(found.weights.manifest) | {"tensors": tensors}


def _store(found: QuantizedCheckpoint) -> dict[str, Any]:
    manifest = found.weights.manifest
    errors = _errors(manifest)
    tensors = []
    for name in found.weights.names:
        shape, dtype = found.shape(name), found.weights.dtype(name)
        row = {"name": name, "shape": list(shape), "type": _name(dtype), "bits": 8.0 * dtype.itemsize}
        if found.weights.is_quantized(name):
            row |= {"type": found.weights.kind(name), "bits": round(found.weights.bits(name), 4)}
            if name in errors:
                row["relative_error"] = errors[name]
        tensors.append(row)
    return _common(found, "store") | _sizes(tensors) | _made(manifest) | {"tensors": tensors}


def _adapter(found: Adapter) -> dict[str, Any]:
    config, pairs = found.folder.config, found.folder.pairs
    parameters = sum(a.numel() + b.numel() for a, b in pairs.values())
    described = {
        "kind": "adapter",
        "layers": len(pairs),
        "parameters": parameters,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "rslora": config.use_rslora,
        "task_type": config.task_type,
        "base": config.base_model_name_or_path,
    }
    tensors = [
        {"name": path, "in": a.shape[1], "out": b.shape[0], "rank": a.shape[0]} for path, (a, b) in pairs.items()
    ]
    return described | _made(found.folder.manifest) | {"tensors": tensors}


def _run(found: Run) -> dict[str, Any]:
    # A line that a kill cut off is no step; the run itself will write it again.
    text = found.metrics_path.read_bytes().rpartition(b"\n")[0] if found.metrics_path.is_file() else b""
    last: dict[str, Any] = json.loads(text.rpartition(b"\n")[2]) if text else {}
    return {
        "kind": "run",
        "finished": found.final_path.is_dir(),
        "settings": read_yaml(found.config_path),
        "checkpoints": [path.name for path in reversed(checkpoints(found.checkpoints_path))],
        "steps": last.get("step", 0),
        "last": last,
    }


def _common(found: Checkpoint | QuantizedCheckpoint, kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "model_type": found.config.get("model_type"),
        "repo": found.repo,
        "revision": found.revision,
        "shards": len(found.weights.shards),
        "bytes": sum(shard.stat().st_size for shard in found.weights.shards),
    }


def _sizes(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    counts = [math.prod(tensor["shape"]) for tensor in tensors]
    bits = sum(count * tensor["bits"] for count, tensor in zip(counts, tensors, strict=True))
    return {"parameters": sum(counts), "bits_per_weight": round(bits / max(1, sum(counts)), 4)}


def _made(manifest: Manifest | None) -> dict[str, Any]:
    return {} if manifest is None else {"inputs": manifest.inputs, "digest": manifest.digest}


def _errors(manifest: Manifest | None) -> dict[str, float]:
    facts = [] if manifest is None else [record.facts.get("tensors", {}) for record in manifest.files.values()]
    return {
        name: known["relative_error"]
        for tensors in facts
        for name, known in tensors.items()
        if "relative_error" in known
    }


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
