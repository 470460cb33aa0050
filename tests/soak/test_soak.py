"""The kill tests of tests/pipe, many times over: `make soak`. Results go to benchmarks/results/soak-cpu.json."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from tests.pipe.kill import Nursery, kill_at_random
from tests.pipe.runs import works

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("soak")]

RUNS = int(os.environ.get("QLORA_PIPE_SOAK_RUNS", "200"))
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "soak-cpu.json"


def test_every_run_killed_at_random_moments_and_rerun_ends_byte_identical(tmp_path: Path) -> None:
    found = {}
    with Nursery(tmp_path / "logs") as nursery:
        for stage, work in works(nursery, tmp_path / "inputs").items():
            begun = time.monotonic()
            tally = kill_at_random(nursery, work, tmp_path / stage, runs=RUNS, seed=0)
            found[stage] = {**dataclasses.asdict(tally), "seconds": round(time.monotonic() - begun)}
            print(f"{stage}: {found[stage]}")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"signal": "SIGKILL", "stages": found}, indent=2) + "\n")
    for stage, tally in found.items():
        assert tally["identical"] == tally["runs"] == RUNS, stage
        assert tally["kills_between_first_and_last_commit"] > 0, stage
