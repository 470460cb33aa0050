"""`quantize` killed before and after every single write, fsync and rename."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_pipe.cli import execute
from tests.pipe.kill import Nursery
from tests.pipe.runs import command, contents, small_checkpoint

pytestmark = pytest.mark.xdist_group("kill points")


def test_killed_at_every_moment_and_rerun_it_ends_byte_identical(
    tmp_path: Path, record_property: Callable[[str, str], None]
) -> None:
    # Several files of at most 1 MiB.
    source = small_checkpoint(tmp_path / "source", hidden_size=128, intermediate_size=384, vocab_size=4000)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"

    def line(out: Path) -> list[str]:
        return command("quantize", source, out, shard_mib=1)

    with Nursery(tmp_path / "logs") as nursery:
        whole = nursery.start(line(tmp_path / "whole"), kill_at=-1)
        assert whole.wait() == 0, whole.said()
        moments = int(whole.said().split()[-1])
        expected = contents(tmp_path / "whole")
        assert len([name for name in expected if name.endswith(".safetensors")]) > 1
        states = set()
        for moment in range(moments):
            child = nursery.start(line(out), kill_at=moment)
            assert child.wait() == -9, (moment, child.said())
            states.add(tuple(sorted(path.name for path in partial.iterdir())) if partial.is_dir() else out.exists())
            if out.exists():
                assert contents(out) == expected, moment
            assert execute(line(out)) == 0, moment
            assert contents(out) == expected, moment
            assert not partial.exists(), moment
            shutil.rmtree(out)
    record_property("counted", f"quantize: killed at {moments} moments, each before or after a disk operation")
    # The kills met an unfinished store in each of its states.
    assert moments > 100
    assert len(states) > 10
