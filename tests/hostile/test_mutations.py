"""Thousands of mutated files: each is refused in one sentence, or opens to exactly what it declares.

Where a folder has a manifest, nothing but its own bytes gets past it: every other mutant is refused when it is opened
or caught by its checksums.
"""

import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from qlora_formats.manifest import MANIFEST, Manifest
from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint
from tests.hostile.mutations import (
    MUTATIONS,
    fate,
    in_parts,
    mutated,
    open_adapter,
    open_model,
    open_store,
    same_object,
)

COUNT = 20_004
SOAK_COUNT = int(os.environ.get("QLORA_PIPE_SOAK_MUTANTS", "1000000"))
# Every so many mutants the command line is asked as well.
THROUGH_THE_COMMAND_LINE = 50
MOST_BYTES = 256 * 2**20
READ_AT_OPEN = ("config.json", "generation_config.json", "adapter_config.json", MANIFEST)


class Seed(NamedTuple):
    """A folder whose files are mutated, and how it is opened."""

    folder: Path
    open_folder: Callable[[Path], Manifest | None]
    has_manifest: bool


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seed]:
    folder = tmp_path_factory.mktemp("seeds")
    sizes = {"hidden_size": 8, "head_dim": 2, "intermediate_size": 6, "num_hidden_layers": 1}
    source = tiny_checkpoint(folder / "checkpoint", dtype=torch.bfloat16, **sizes)
    (folder / "text.txt").write_text("a few words to train on, and a few more\n" * 20)
    store, run = folder / "store", folder / "run"
    train = f"finetune {store} --data text:{folder / 'text.txt'} --out {run} --steps 1 --rank 2"
    for words in (["quantize", str(source), str(store)], [*train.split(), "--batch-size", "1", "--max-tokens", "32"]):
        assert execute(words) == 0
    foreign = shutil.copytree(store, folder / "foreign")
    (foreign / MANIFEST).unlink()
    return {
        "checkpoint": Seed(source, open_model, has_manifest=False),
        "store": Seed(store, open_store, has_manifest=True),
        "foreign store": Seed(foreign, open_store, has_manifest=False),
        "adapter": Seed(run / "final", open_adapter, has_manifest=True),
    }


def run_mutants(seeds: dict[str, Seed], folder: Path, mutation: str, *, count: int) -> Counter[str]:
    """Mutate a file, open its folder and put it back, `count` times; gives how many ended how."""
    rng = random.Random(mutation)
    tally: Counter[str] = Counter()
    for kind, (source, open_folder, has_manifest) in seeds.items():
        work = shutil.copytree(source, folder / kind)
        names = [path.name for path in work.iterdir() if path.suffix == ".safetensors" or path.name in READ_AT_OPEN]
        parts_of = {name: in_parts(work / name) for name in names}
        for number in range(-(-count // len(seeds))):
            name, data = mutated(parts_of, mutation, rng)
            before = parts_of[name].whole
            replace(work / name, data)
            found = fate(work, open_folder, has_manifest=has_manifest)
            if has_manifest and found == "accepted":
                assert data == before or (name == MANIFEST and same_object(data, before)), (kind, name)
            if number % THROUGH_THE_COMMAND_LINE == 0:
                assert inspected(work) in ({65} if found == "refused" else {0}), (kind, name)
            tally[found] += 1
            replace(work / name, before)
    return tally


def replace(path: Path, data: bytes) -> None:
    # Never over the old bytes: they may still be mapped.
    path.with_name("new").write_bytes(data)
    path.with_name("new").rename(path)


def inspected(folder: Path) -> int:
    """The exit code of `inspect`, which must say nothing or one line on stderr."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:
        code = execute(["inspect", str(folder), "--json"])
    assert len(said.getvalue().splitlines()) == (code != 0), said.getvalue()
    return code


def start_watching_memory() -> int:
    """Forget the peak that this process has had so far, where the system can; gives what it holds now, in bytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def check(seeds: dict[str, Seed], folder: Path, mutation: str, *, count: int) -> str:
    """Run the mutants of one class in bounded memory; gives a line that says what became of them."""
    begun = start_watching_memory()
    tally = run_mutants(seeds, folder, mutation, count=count)
    peak_bytes = peak_memory() - begun
    assert peak_bytes < MOST_BYTES
    assert tally.total() >= count
    assert tally["refused"] + tally["caught by checksums"] > 0
    ends = ", ".join(f"{tally[end]:,} {end}" for end in ("refused", "caught by checksums", "accepted"))
    return f"{mutation}: of {tally.total():,} files {ends}, in {peak_bytes / 2**20:.1f} MiB"


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_file_is_refused_or_opens_as_what_it_declares(
    seeds: dict[str, Seed], tmp_path: Path, record_property: Callable[[str, object], None], mutation: str
) -> None:
    record_property("counted", check(seeds, tmp_path, mutation, count=COUNT // len(MUTATIONS)))


@pytest.mark.soak
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_million_mutated_files_are(
    seeds: dict[str, Seed], tmp_path: Path, record_property: Callable[[str, object], None], mutation: str
) -> None:
    record_property("counted", check(seeds, tmp_path, mutation, count=SOAK_COUNT // len(MUTATIONS)))
