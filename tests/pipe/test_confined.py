"""The confined process: every limit is met for real, and every way it can end is one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe.confined import ConfinedError, Limits, run_confined
from qlora_pipe.confined.limits import forbid_files_and_tcp

TASKS = "tests.pipe.confined_tasks"
MIB = 2**20


def limits(**changes: int) -> Limits:
    return Limits(**{"memory_bytes": 64 * MIB, "cpu_seconds": 20, "wait_seconds": 60, "output_bytes": MIB} | changes)


def confined(do: str, *, file: Any = None, limits: Limits = limits(), **request: Any) -> bytes:  # noqa: B008
    answer = bytearray()
    run_confined(TASKS, {"do": do, **request}, what="cannot read it", limits=limits, write=answer.extend, file=file)
    return bytes(answer)


def fails(do: str, sentence: str, **details: Any) -> None:
    with pytest.raises(ConfinedError) as caught:
        confined(do, **details)
    assert str(caught.value) == f"cannot read it: {sentence}."


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(b"mine")
    return path


@pytest.fixture(scope="module")
def landlock() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if forbid_files_and_tcp() else 1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        pytest.skip("this kernel offers no Landlock")


def test_the_answer_comes_piece_by_piece() -> None:
    assert confined("answer", pieces=["one ", "and ", "two"]) == b"one and two"


def test_a_request_may_be_longer_than_a_pipe_holds() -> None:
    assert confined("measure_the_request", text="x" * 3_000_000) == b"3000000"


def test_an_open_file_can_be_read_and_none_be_opened(victim: Path) -> None:
    with victim.open("rb") as file:
        assert confined("read_the_file", file=file) == b"mine"
    fails("read_a_file", "the process that read it failed (OSError)", path=str(victim))


def test_a_stray_print_stays_out_of_the_answer() -> None:
    assert confined("print_by_chance") == b"the answer"


def test_it_learns_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "relative")
    known = json.loads(confined("say_what_is_known"))
    assert known["folder"] == "/"
    assert "hf_secret" not in json.dumps(known)
    assert not {"HOME", "PATH", "PYTHONPATH"} & known["environment"].keys()
    assert all(Path(path).is_absolute() for path in known["path"])


def test_a_refusal_is_handed_on_in_one_line_fit_to_be_shown() -> None:
    fails("refuse", "it holds no tensor", why="it holds no tensor")
    fails("refuse", "two ?[31m", why="one\ntwo \x1b[31m")
    fails("refuse", "x" * 297 + "...", why="x" * 5000)
    fails("refuse", "it was refused without a reason", why="")


def test_an_error_is_named_without_a_traceback() -> None:
    fails("fail", "the process that read it failed (LookupError)")
    fails("exit_early", "the process that read it failed (SystemExit)")
    fails("leave_with_a_code", "the process that read it failed (exit code 3)")


def test_a_crash_is_named_by_its_signal() -> None:
    fails("crash", "the process that read it was ended by SIGSEGV")


def test_memory_ends_and_is_counted_from_what_the_interpreter_takes() -> None:
    assert confined("allocate_a_little") == b"50331648"
    fails("allocate", "it needs more than the 64 MiB of memory that it may use")


def test_computing_ends() -> None:
    fails("spin", "it took more than 1 s of computing", limits=limits(cpu_seconds=1))


@pytest.mark.parametrize("do", ["sleep", "close_and_sleep"])
def test_waiting_ends(do: str) -> None:
    fails(do, "it took more than 1 s", limits=limits(wait_seconds=1))


def test_an_endless_answer_ends() -> None:
    fails("answer_forever", "it gave more than 1,048,576 bytes")


def test_endless_complaints_end() -> None:
    fails("complain_forever", "it complained without end")


@pytest.mark.parametrize("do", ["open_a_new_file", "grow_an_open_file"])
def test_it_writes_no_file(do: str, victim: Path) -> None:
    fails(do, "the process that read it failed (OSError)", path=str(victim))
    assert [path.read_bytes() for path in victim.parent.iterdir()] == [b"mine"]


@pytest.mark.parametrize("do", ["delete_a_file", "truncate_a_file", "start_a_program"])
@pytest.mark.usefixtures("landlock")
def test_it_changes_no_file_and_starts_no_program(do: str, victim: Path) -> None:
    fails(do, "the process that read it failed (PermissionError)", path=str(victim))
    assert victim.read_bytes() == b"mine"


def test_it_opens_no_socket() -> None:
    fails("connect", "the process that read it failed (OSError)")


@pytest.mark.skipif(os.getuid() == 0, reason="the number of root's processes is not limited")
def test_it_starts_no_process() -> None:
    fails("fork", "the process that read it failed (BlockingIOError)")


@pytest.mark.skipif(os.getuid() != 0, reason="only root's processes can fork here")
def test_what_root_forks_ends_with_it() -> None:
    # The child of the process holds the pipe open, so there is no end of the answer to be seen.
    fails("fork", "it took more than 1 s", limits=limits(wait_seconds=1))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_ends_when_its_caller_is_interrupted() -> None:
    pids = []

    def interrupted(piece: bytes) -> None:
        pids.append(int(piece))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_confined(TASKS, {"do": "sleep"}, what="", limits=limits(), write=interrupted)
    assert not is_alive(pids[0])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends when it next answers")
def test_it_ends_when_its_caller_is_killed() -> None:
    code = (
        "from qlora_pipe.confined import Limits, run_confined\n"
        "limits = Limits(memory_bytes=2**26, cpu_seconds=9, wait_seconds=600, output_bytes=99)\n"
        f"run_confined({TASKS!r}, {{'do': 'sleep'}}, what='', limits=limits,\n"
        "             write=lambda pid: print(pid.decode(), flush=True))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    pid = int(caller.stdout.readline())
    assert is_alive(pid)
    caller.send_signal(signal.SIGKILL)
    caller.communicate()
    deadline = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
