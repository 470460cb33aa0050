"""What opening costs: it follows from the number of tensors, and never from their bytes. Counted, not timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hollow import SHAPES, Shape, hollow_store
from qlora_formats.store import Store, StoredWeight

_COUNTED = """
import json, os, sys
from pathlib import Path
from qlora_formats.store import Store

def resident():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

def read():
    return int(Path("/proc/self/io").read_text().split()[1])

small, large = map(Path, sys.argv[1:])
Store.open(small)
before = resident(), read()
store = Store.open(large)
after = resident(), read()
mapped = sum(str(large) in line for line in Path("/proc/self/maps").read_text().splitlines())
print(json.dumps({"resident": after[0] - before[0], "read": after[1] - before[1], "mapped": mapped}))
"""

needs_proc = pytest.mark.skipif(
    not (Path("/proc/self/io").exists() and Path("/proc/self/smaps_rollup").exists()),
    reason="the system does not say what a process reads and maps",
)


def counted(small: Path, large: Path) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", _COUNTED, str(small), str(large)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@needs_proc
def test_opening_70_billion_weights_maps_nothing_and_keeps_less_than_a_thousandth_of_them(tmp_path: Path) -> None:
    small = hollow_store(tmp_path / "small", Shape(1, 64, 128, 64, 10), shard_mib=1)
    large = hollow_store(tmp_path / "large", SHAPES["70B"], shard_mib=4096)
    n_bytes = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert n_bytes > 39e9
    found = counted(small, large)
    assert found["mapped"] == 0
    assert found["resident"] < n_bytes / 1000
    assert found["read"] < n_bytes / 10_000


@needs_proc
def test_the_same_tensors_with_64_times_the_bytes_are_opened_by_reading_hardly_more(tmp_path: Path) -> None:
    # The offsets in the headers have more digits.
    shapes = {"small": Shape(8, 1024, 1024, 1024, 1024), "large": Shape(8, 8192, 8192, 8192, 8192)}
    folders = {name: hollow_store(tmp_path / name, shape, shard_mib=2**20) for name, shape in shapes.items()}
    sizes = {name: (folder / "model.safetensors").stat().st_size for name, folder in folders.items()}
    assert sizes["large"] > 50 * sizes["small"]
    read = {name: counted(folders["small"], folder)["read"] for name, folder in folders.items()}
    assert read["large"] < 1.25 * read["small"] < 200_000


@pytest.mark.parametrize("load", ["mmap", "read"])
def test_the_weights_of_a_hollow_store_are_what_its_headers_say(tmp_path: Path, load: str) -> None:
    shape = Shape(2, 128, 320, 64, 50)
    store = Store.open(hollow_store(tmp_path / "store", shape, shard_mib=4096), load=load)  # type: ignore[arg-type]
    weight = store.weight("model.layers.1.mlp.up_proj.weight")
    assert isinstance(weight, StoredWeight)
    assert (weight.shape, weight.codes.numel(), weight.absmax.numel()) == ((320, 128), 320 * 64, 320 * 2)
    assert not weight.codes.any()
    assert weight.offset is not None
    offsets = {float(store.weight(name).offset) for name in store.names if store.is_quantized(name)}  # type: ignore[union-attr]
    assert len(offsets) == 14
