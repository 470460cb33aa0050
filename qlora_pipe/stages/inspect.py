"""Inspect: say what a folder is, from its headers alone."""

import math
import re
from typing import Any

from qlora_formats.adapter import ADAPTER_CONFIG
from qlora_formats.manifest import Manifest
from qlora_formats.store import is_store
from qlora_formats.strict_json import parse_object
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint, Run
from qlora_pipe.hub import resolve
from qlora_pipe.settings import read_yaml
from qlora_pipe.train.checkpoint import checkpoints

_BLOCK = re.compile(r"(.*?\.\d+)\.")


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
    described = _common(found, "store") | _sizes(tensors) | _quantization(found) | _error(tensors) | _made(manifest)
    return described | {"blocks": _blocks(tensors), "tensors": tensors}


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
    where = f"the last line of {found.metrics_path}"
    last = parse_object(text.rpartition(b"\n")[2], what=where) if text else {}
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


def _quantization(found: QuantizedCheckpoint) -> dict[str, Any]:
    settings = found.config["quantization_config"]
    prefix = "bnb_4bit_"
    return {"quantization": {key[len(prefix) :]: value for key, value in settings.items() if key.startswith(prefix)}}


def _error(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    """The relative error of several tensors together, where it was recorded: their root mean square by weights.

    That is |W - Q(W)| / |W| of all of them as far as weights are of about one size, which their norms would tell.
    """
    measured = [(math.prod(row["shape"]), row["relative_error"]) for row in tensors if "relative_error" in row]
    if not measured:
        return {}
    mean_square = sum(count * error**2 for count, error in measured) / sum(count for count, _ in measured)
    worst = max((row for row in tensors if "relative_error" in row), key=lambda row: row["relative_error"])
    return {
        "relative_error": float(f"{mean_square**0.5:.4g}"),
        "largest_error": worst["relative_error"],
        "largest_error_of": worst["name"],
    }


def _blocks(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tensors of each block together, in the order of the blocks; a block is what shares a path up to a number."""
    blocks: dict[str, list[dict[str, Any]]] = {}
    for row in tensors:
        found = _BLOCK.match(row["name"])
        if found:
            blocks.setdefault(found[1], []).append(row)
    return [
        {"name": name, "tensors": len(rows)} | _sizes(rows) | _error(rows)
        for name, rows in sorted(blocks.items(), key=lambda item: _counting(item[0]))
    ]


def _counting(block: str) -> tuple[str, int]:
    path, _, number = block.rpartition(".")
    return path, int(number)


def _made(manifest: Manifest | None) -> dict[str, Any]:
    if manifest is None:
        return {}
    files = {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in manifest.files.items()}
    return {"inputs": manifest.inputs, "fields": manifest.fields, "files": files, "digest": manifest.digest}


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
