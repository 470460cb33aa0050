"""Loading a store onto a GPU, against a copy of its bytes and transformers: `python benchmarks/gpu_load.py`.

The store has the shape of LLaMA 8B (with --quick, of 1B) and random bytes. Each loading is in a process of its own that
has loaded a tiny store before, so that the start of Python, CUDA and the libraries is not counted; what is counted is
from the folder to a model whose tensors are all on the GPU. "warm" finds the files in the system's cache, from "cold"
they were dropped. transformers loads the very same store with bitsandbytes. "copy" takes the store's bytes from one
piece of pinned memory that is there. "open" is the CPU's: the folder to a model over the mapped files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gpu
import torch
from hollow import SHAPES, Shape, hollow_store
from report import publish

_GB = 1e9
_TINY = Shape(2, 256, 512, 256, 1000)
_COPY_BYTES = 1 << 28
WAYS = ("resident", "streamed", "mapped", "transformers", "copy", "open")
PEERS = ("transformers", "bitsandbytes")


def load_ours(folder: Path, residency: str, device: str) -> object:
    """A model with all its tensors where they are to be."""
    from qlora_pipe.artifacts import open_model
    from qlora_pipe.plugins import find_architecture, load_plugins
    from qlora_pipe.stages.load import load

    base = open_model(folder)
    architecture = find_architecture(load_plugins(), base.config["model_type"])
    loaded = load(base, architecture, dtype=torch.bfloat16, device=torch.device(device), residency=residency)  # type: ignore[arg-type]
    if device == "cuda":
        torch.cuda.synchronize()
    return loaded


def load_theirs(folder: Path) -> object:
    """The same by transformers and bitsandbytes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    return model


def copy_pinned(n_bytes: int) -> None:
    """So many bytes from pinned memory to the GPU."""
    pinned = torch.randint(0, 256, (_COPY_BYTES,), dtype=torch.uint8).pin_memory()
    target = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for start in range(0, n_bytes, _COPY_BYTES):
        piece = target[start : start + _COPY_BYTES]
        piece.copy_(pinned[: piece.numel()], non_blocking=True)
    torch.cuda.synchronize()
    print(json.dumps(time.perf_counter() - begun))


def measure(way: str, folder: Path, tiny: Path) -> None:
    """Load the tiny store, then the other one; print the seconds of the latter."""
    if way == "copy":
        copy_pinned(bytes_of(folder))
        return
    run: Callable[[Path], object]
    if way == "transformers":
        run = load_theirs
    else:
        residency, device = ("resident", "cpu") if way == "open" else (way, "cuda")

        def run(path: Path) -> object:
            return load_ours(path, residency, device)

    run(tiny)
    begun = time.perf_counter()
    model = run(folder)
    print(json.dumps(time.perf_counter() - begun))
    del model


def bytes_of(folder: Path) -> int:
    """The size of a store's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def drop_from_cache(folder: Path) -> None:
    """Let the system forget the pages of files; they must be on the disk for that."""
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(folder: Path) -> None:
    """Read files once."""
    buffer = bytearray(1 << 24)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def seconds_of(way: str, folder: Path, tiny: Path, *, cold: bool, rounds: int) -> list[float]:
    """Of each round, sorted; empty where a way is not to be had here, which is printed."""
    found = []
    for _ in range(rounds):
        (drop_from_cache if cold else fill_cache)(folder)
        words = [sys.executable, __file__, "--measure", way, str(folder), str(tiny)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{way} failed: {done.stderr.strip().splitlines()[-1:]}")
            return []
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the shape of LLaMA 1B, and one round")
    parser.add_argument("--rounds", type=int, default=3, help="loadings of each kind (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where the stores are made (default: the system's temporary folder)"
    )
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "STORE", "TINY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    gpu.require_gpu()
    if arguments.measure:
        way, folder, tiny = arguments.measure
        measure(way, Path(folder), Path(tiny))
        return
    size, rounds = ("1B", 1) if arguments.quick else ("8B", arguments.rounds)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = hollow_store(Path(scratch) / "store", SHAPES[size], shard_mib=4096, content="noise")
        tiny = hollow_store(Path(scratch) / "tiny", _TINY, shard_mib=4096, content="noise")
        n_bytes = bytes_of(folder)
        found = {
            (way, cold): seconds_of(way, folder, tiny, cold=cold, rounds=rounds)
            for way in WAYS
            for cold in ((False, True) if way in {"resident", "transformers"} else (False,))
        }
        copy, theirs = found["copy", False], found["transformers", False]
        for (way, cold), seconds in found.items():
            if seconds:
                median = seconds[len(seconds) // 2]
                rows.append(
                    {
                        "way": way,
                        "store": f"LLaMA {size}, {n_bytes / _GB:.2f} GB",
                        "cache": "cold" if cold else "warm",
                        "seconds": round(median, 4),
                        "fastest": round(seconds[0], 4),
                        "slowest": round(seconds[-1], 4),
                        "GB/s": round(n_bytes / median / _GB, 2),
                        "of the copy": round(copy[len(copy) // 2] / median, 3) if copy else "",
                        "x transformers": round(theirs[len(theirs) // 2] / median, 2) if theirs else "",
                    }
                )
    publish("gpu_load", rows=rows, peers=PEERS)


if __name__ == "__main__":
    main()
