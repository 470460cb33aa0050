"""Hashing several files at a time: the same digests as one by one, and an end at once when nobody waits any more."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qlora_formats.errors import FormatError
from qlora_formats.hashing import CHUNK_BYTES, FileHash, hash_file, hash_files, in_threads

# As many bytes as no machine hashes while a test runs; holes take no room on the disk.
ENDLESS = 2**42


def sparse(path: Path, n_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(n_bytes)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    draws = random.Random(0)
    sizes = [0, 1, 4097, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 7, 2]
    paths = [tmp_path / f"{number}.bin" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(draws.randbytes(size))
    return paths


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("threads", [0, 1, 3, 20])
def test_each_file_has_the_sha256_of_its_bytes_in_the_order_asked(
    files: list[Path], threads: int, *, mapped: bool
) -> None:
    expected = {path: FileHash(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}
    found = hash_files([*files, files[2]], threads=threads, mapped=mapped)
    assert found == expected
    assert list(found) == files
    assert [hash_file(path) for path in files] == list(expected.values())


def test_progress_rises_in_the_calling_thread_and_ends_at_the_sum_of_all_bytes(files: list[Path]) -> None:
    seen: list[tuple[int, int]] = []
    callers = set()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        callers.add(threading.current_thread())

    hash_files(files, threads=2, progress=progress)
    total = sum(path.stat().st_size for path in files)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert {there for _, there in seen} == {total}
    assert callers == {threading.current_thread()}


def test_no_file_is_no_work() -> None:
    assert hash_files([]) == {}


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_left(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot read .*/absent: No such file or directory"):
        hash_files([sparse(tmp_path / "endless", ENDLESS), tmp_path / "absent"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(FormatError, match=r"cannot read .*/folder: Is a directory"):
        hash_files([sparse(tmp_path / "endless", ENDLESS), tmp_path / "folder"], threads=2)
    with pytest.raises(FormatError, match=r"cannot read .*/folder: Is a directory"):
        hash_file(tmp_path / "folder")


def test_a_mapped_file_takes_no_memory_of_its_own_and_leaves_no_mapping_behind(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from qlora_formats.hashing import hash_file\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "hash_file(Path(sys.argv[1]), mapped=True)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "print(sys.argv[1] in Path('/proc/self/maps').read_text())\n"
    )
    (tmp_path / "large").write_bytes(bytes(96 * 2**20))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    grown_kib, mapped = done.stdout.split()
    assert int(grown_kib) < 24 * 1024
    assert mapped == "False"


@pytest.mark.parametrize("mapped", [False, True])
def test_an_exception_of_progress_ends_all_threads(tmp_path: Path, *, mapped: bool) -> None:
    before = threading.active_count()

    def progress(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hash_files([sparse(tmp_path / name, ENDLESS) for name in "abcdef"], threads=2, mapped=mapped, progress=progress)
    assert threading.active_count() == before


def test_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qlora_formats.hashing import hash_files\n"
        "def progress(done, total):\n"
        "    print(done, flush=True)\n"
        "hash_files([Path(name) for name in sys.argv[1:]], threads=2, progress=progress)\n"
    )
    names = [str(sparse(tmp_path / name, ENDLESS)) for name in "abc"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    assert child.stdout is not None
    while child.stdout.readline().strip() in {"", "0"}:
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert said.splitlines()[-1] == "KeyboardInterrupt"
    assert child.returncode == -signal.SIGINT


def test_results_come_in_the_order_of_the_jobs_and_the_first_fault_is_raised() -> None:
    assert in_threads([lambda _meter, n=n: n * n for n in range(50)], threads=3) == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        in_threads([lambda _meter: 1, lambda _meter: 1 // 0], threads=1)
