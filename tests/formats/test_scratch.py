"""Memory that lies on a disk, in a file that nobody sees."""

import errno
import os
from pathlib import Path

import pytest

from qlora_formats import disk
from qlora_formats.commit import scratch_memory
from qlora_formats.errors import CommitError
from qlora_formats.journal import temporary


def test_scratch_memory_is_zeros_that_can_be_written_and_has_no_name(tmp_path: Path) -> None:
    with scratch_memory(tmp_path / "run" / "states", 100_001) as memory:
        assert len(memory) == 100_001
        assert memory[:] == bytes(100_001)
        memory[100_000] = 7
        memory.flush()
        assert memory[100_000] == 7
        assert not list((tmp_path / "run").iterdir())


def test_two_users_of_one_name_do_not_share(tmp_path: Path) -> None:
    with scratch_memory(tmp_path / "states", 10) as one, scratch_memory(tmp_path / "states", 10) as other:
        one[0] = 1
        assert other[0] == 0


def test_a_name_left_by_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    temporary(tmp_path / "states").write_bytes(b"left")
    with scratch_memory(tmp_path / "states", 10) as memory:
        assert memory[:] == bytes(10)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _n_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "_reserve", full)
    with pytest.raises(CommitError, match=r"cannot write .*states: No space left on device \(.* MiB are free") as fault:
        scratch_memory(tmp_path / "states", 10)
    assert fault.value.reason == "disk"
    assert not list(tmp_path.iterdir())


def test_more_room_than_there_is_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CommitError, match="cannot write"):
        scratch_memory(tmp_path / "states", 2**60)
    assert not list(tmp_path.iterdir())
