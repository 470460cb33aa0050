"""What every benchmark shares: interleaved timing, the machine's description, a table and a JSON file."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).resolve().parent / "results"


class Timing(NamedTuple):
    """Seconds of one call: medians over the rounds, and the fastest and slowest round."""

    wall: float
    cpu: float
    fastest: float
    slowest: float


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, pause: float = 0.0
) -> dict[str, Timing]:
    """Time the candidates in turn, round after round, so that a busy moment meets all of them; one warm-up each.

    `pause` seconds before each call let the threads of the one before fall asleep: torch's stay busy after their work.
    CPU seconds sum over all threads: on a shared machine they tell more than the clock.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            time.sleep(pause)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    timings = {}
    for name, pairs in samples.items():
        walls, cpus = zip(*pairs, strict=True)
        timings[name] = Timing(statistics.median(walls), statistics.median(cpus), min(walls), max(walls))
    return timings


def machine() -> dict[str, object]:
    """The processor and, if there is one, the GPU; no names of hosts or users."""
    description: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def published(name: str) -> list[dict[str, object]]:
    """Give the rows of results/NAME.json, none where there is no such file."""
    file = RESULTS / f"{name}.json"
    rows: list[dict[str, object]] = json.loads(file.read_text())["rows"] if file.exists() else []
    return rows


def publish(
    name: str,
    *,
    rows: Sequence[Mapping[str, object]],
    peers: Sequence[str],
    ceilings: Mapping[str, float] | None = None,
) -> None:
    """Print the rows as a table and write results/NAME.json with the machine and the versions of the peers.

    `ceilings` are the machine's limits, as measured in the run.
    """
    versions = {package: version(package) for package in ("torch", *peers)}
    # Curves go to the file alone.
    columns = [name for name, value in rows[0].items() if not isinstance(value, dict | list)]
    cells = [columns, *([_shown(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(", ".join(f"{key} {value}" for key, value in (machine() | versions).items()))
    if ceilings:
        print(", ".join(f"{key} {_shown(value)}" for key, value in ceilings.items()))
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    RESULTS.mkdir(exist_ok=True)
    document: dict[str, object] = {"benchmark": name, "machine": machine(), "versions": versions}
    if ceilings:
        document["ceilings"] = dict(ceilings)
    document["rows"] = [dict(row) for row in rows]
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
