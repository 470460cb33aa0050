"""Opening a store, by its size: `python benchmarks/load.py`.

The stores have the headers, JSON and manifests of real ones, with holes for weights: opening reads none of those. Each
is opened in a process of its own, after the imports. "same layers" is one layer's worth of tensors at 1, 4 and 16
times the size: what grows with the bytes would show there.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hollow import SHAPES, Shape, hollow_store
from report import publish

from qlora_formats.header import read_header

_GB = 1e9
_SAME_LAYERS = {f"same layers x{times}": Shape(8, 1024 * times, 4096, 1024, 1000) for times in (1, 4, 16)}


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Open a store in this process; seconds of the first and a later opening, and the bytes it took."""
    from qlora_pipe.artifacts import QuantizedCheckpoint

    # Python and torch pay once for what any first call costs them; a tiny store takes that upon itself.
    with tempfile.TemporaryDirectory() as tiny:
        QuantizedCheckpoint.open(hollow_store(Path(tiny) / "tiny", Shape(1, 64, 128, 64, 10), shard_mib=1))
    # The imports have left many objects, and a collection that is due walks through all of torch.
    gc.collect()
    before, read_before = _resident(), _read()
    first, _ = _seconds(lambda: QuantizedCheckpoint.open(folder))
    store = QuantizedCheckpoint.open(folder)
    found = {"read_bytes": float(_read() - read_before) / 2, "resident_bytes": float(_resident() - before)}
    assert store.weights.names
    walls, cpus = zip(*[_seconds(lambda: QuantizedCheckpoint.open(folder)) for _ in range(rounds)], strict=True)
    return found | {"first": first, "median": statistics.median(walls), "best": min(walls), "cpu": min(cpus)}


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of the processor: on a shared machine these tell more."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def _resident() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def _read() -> int:
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="timed openings of each store (default: %(default)s)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.rounds)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, shape in {**_SAME_LAYERS, **{f"LLaMA {size}": shape for size, shape in SHAPES.items()}}.items():
            folder = hollow_store(Path(scratch) / name, shape, shard_mib=4096)
            shards = list(folder.glob("*.safetensors"))
            n_bytes = sum(shard.stat().st_size for shard in shards)
            words = [sys.executable, __file__, "--measure", str(folder), "--rounds", str(arguments.rounds)]
            found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            rows.append(
                {
                    "store": name,
                    "GB": round(n_bytes / _GB, 2),
                    "tensors": sum(len(read_header(shard).entries) for shard in shards),
                    "first ms": round(found["first"] * 1e3, 1),
                    "median ms": round(found["median"] * 1e3, 1),
                    "best ms": round(found["best"] * 1e3, 1),
                    "CPU ms": round(found["cpu"] * 1e3, 1),
                    "read MB": round(found["read_bytes"] / 1e6, 2),
                    "resident MB": round(found["resident_bytes"] / 1e6, 2),
                    "resident/file": f"{found['resident_bytes'] / n_bytes:.4%}",
                }
            )
    publish("load", rows=rows, peers=[])


if __name__ == "__main__":
    main()
