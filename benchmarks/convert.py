"""`quantize` as a whole: speed against raw reading and writing, and peak memory: `python benchmarks/convert.py`.

The sources are LLaMA-shaped and made here, in bfloat16 and in files of 4 GiB as such models are published; one has four
times the bytes of the other and the same largest tensor. Raw means reading the source's files and writing and fsyncing
as many bytes as the store has, with all cores and with one thread. Warm: the source is in the page cache. Cold: it was
dropped from there just before, for both sides. "Its sha256 alone" is what hashing as many bytes as `quantize` hashes
takes on all cores, with nothing else to do.
"""

import argparse
import hashlib
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from report import publish

from qlora_formats.checkpoint import INDEX, shard_names
from qlora_formats.tensorfile import TensorPlan, write_tensors

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 4096, 14336, 32, 8, 32000
SHARD_BYTES = 4 * 2**30
PIECE = 8 * 2**20


def shapes_of(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's tensors, in the order of published files."""
    key_value = HIDDEN // HEADS * KEY_VALUE_HEADS
    attention = {"q": (HIDDEN, HIDDEN), "k": (key_value, HIDDEN), "v": (key_value, HIDDEN), "o": (HIDDEN, HIDDEN)}
    mlp = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield from ((f"{prefix}.self_attn.{name}_proj.weight", shape) for name, shape in attention.items())
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        yield from ((f"{prefix}.mlp.{name}_proj.weight", shape) for name, shape in mlp.items())
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make_source(folder: Path, *, layers: int) -> Path:
    """Write the checkpoint, from one pool of random values in which each tensor starts at another place."""
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "dtype": "bfloat16",
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    pool = torch.randn(2**27, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    plans = [TensorPlan(name, torch.bfloat16, shape) for name, shape in shapes_of(layers)]
    place = {plan.name: 64 * 7919 * number for number, plan in enumerate(plans)}

    def produce(name: str) -> torch.Tensor:
        shape = next(plan.shape for plan in plans if plan.name == name)
        start = place[name] % (pool.numel() - math.prod(shape) + 1)
        return pool[start : start + math.prod(shape)].view(shape)

    shards: list[list[TensorPlan]] = [[]]
    for plan in plans:
        if sum(other.n_bytes for other in shards[-1]) + plan.n_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(plan)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            write_tensors(file, shard, produce, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {plan.name: name for name, shard in zip(names, shards, strict=True) for plan in shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _size(path: Path) -> int:
    return path.stat().st_size


def _read(path: Path, start: int, stop: int) -> None:
    buffer = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop:
            count = file.readinto(buffer[: stop - start])
            assert count
            start += count


def raw(source: Path, scratch: Path, *, written: int, threads: int) -> float:
    """Seconds to read the source's files and to write and fsync `written` bytes."""
    data = os.urandom(PIECE)
    begun = time.perf_counter()
    spans = [
        (path, start, min(start + 2**28, _size(path)))
        for path in sorted(source.glob("*.safetensors"))
        for start in range(0, _size(path), 2**28)
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda span: _read(*span), spans))
    with scratch.open("wb", buffering=0) as file:
        for start in range(0, written, PIECE):
            file.write(data[: written - start])
            # As the product does: begin to write out at once, so that the fsync has little left.
            if start % (8 * PIECE) == 0:
                os.posix_fadvise(file.fileno(), 0, start, os.POSIX_FADV_DONTNEED)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    scratch.unlink()
    return seconds


def hashed(n_bytes: int, *, threads: int) -> float:
    """Seconds to take the sha256 of `n_bytes` bytes, shared out evenly, from memory."""
    data = os.urandom(PIECE)

    def work(share: int) -> None:
        sha256 = hashlib.sha256()
        for start in range(0, share, PIECE):
            sha256.update(data[: share - start])

    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [n_bytes // threads] * threads))
    return time.perf_counter() - begun


def forget(source: Path) -> None:
    """Drop a source from the page cache."""
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(source: Path, out: Path) -> dict[str, float]:
    """Run `quantize` in a process of its own and say what it took; the store is deleted."""
    line = [sys.executable, __file__, "--child", str(source), str(out)]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    written = sum(map(_size, out.glob("*.safetensors")))
    shutil.rmtree(out)
    return {**json.loads(done.stdout.splitlines()[-1]), "written": written}


def child(source: str, out: str) -> None:
    """Quantise, and print seconds, CPU seconds, and the peak of memory above what was there after the imports."""
    from qlora_pipe.artifacts import Checkpoint
    from qlora_pipe.config import QuantizeConfig
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.quantize import quantize

    manager = load_plugins()
    # The peak counts from here, and not from what the process that started this one had.
    Path("/proc/self/clear_refs").write_text("5")
    resident = memory("VmRSS")
    before = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.perf_counter()
    quantize(Checkpoint.open(source), Path(out), QuantizeConfig(), manager=manager)
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = {
        "seconds": seconds,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak": memory("VmHWM") - resident,
    }
    print(json.dumps(used))


def memory(field: str) -> int:
    """Bytes that this process has in memory now (VmRSS), or had at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def measure(source: Path, folder: Path, *, rounds: int, cold: bool) -> dict[str, object]:
    """One row: medians of interleaved rounds."""
    cores = os.cpu_count() or 1
    found: dict[str, list[float]] = {"quantize": [], "cpu": [], "peak": [], "raw": [], "raw one thread": [], "hash": []}
    written = convert(source, folder / "store")["written"]
    read = sum(map(_size, source.glob("*.safetensors")))
    for _ in range(rounds):
        # The source's files, and the store's bytes twice: for the files, and for each weight.
        found["hash"].append(hashed(int(read + 2 * written), threads=cores))
        for name, threads in (("raw", cores), ("raw one thread", 1)):
            if cold:
                forget(source)
            found[name].append(raw(source, folder / "raw", written=int(written), threads=threads))
        if cold:
            forget(source)
        used = convert(source, folder / "store")
        for name, key in (("quantize", "seconds"), ("cpu", "cpu"), ("peak", "peak")):
            found[name].append(used[key])
    medians = {name: statistics.median(values) for name, values in found.items()}
    largest = 2 * VOCABULARY * HIDDEN
    return {
        "source GB": round(read / 1e9, 2),
        "store GB": round(written / 1e9, 2),
        "page cache": "cold" if cold else "warm",
        "quantize s": round(medians["quantize"], 2),
        "CPU s": round(medians["cpu"], 1),
        "GB/s": round(read / medians["quantize"] / 1e9, 2),
        "raw, all cores s": round(medians["raw"], 2),
        "raw, one thread s": round(medians["raw one thread"], 2),
        "its sha256 alone, all cores s": round(medians["hash"], 2),
        "raw/quantize": round(medians["raw"] / medians["quantize"], 2),
        "raw one thread/quantize": round(medians["raw one thread"] / medians["quantize"], 2),
        "peak MB": round(max(found["peak"]) / 1e6, 1),
        "largest tensor MB": round(largest / 1e6, 1),
        "allowed MB": round((3 * largest + 256 * 2**20) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 20), help="of the two models (default: 4 20)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work: 15 GB are needed (default: a temporary folder)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        rows = []
        for number, layers in enumerate(arguments.layers):
            source = make_source(folder / f"source-{number}", layers=layers)
            rows += [measure(source, folder, rounds=arguments.rounds, cold=cold) for cold in (False, True)]
            shutil.rmtree(source)
    publish("convert", rows=rows, peers=[])


if __name__ == "__main__":
    main()
