"""What a stranger might make the confined process do, for tests: each function is done once it is shut in."""

import ctypes
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from qlora_pipe.confined.ending import Refused
from qlora_pipe.confined.worker import Work, Write


def prepare(request: dict[str, Any], file: BinaryIO | None) -> Work:
    """Find the function that is asked for; a file that is to be misused is opened while that is possible."""
    if request["do"] == "grow_an_open_file":
        request["fd"] = os.open(request["path"], os.O_WRONLY)
    task: Callable[..., None] = globals()[request["do"]]
    return lambda write: task(write, request, file)


def answer(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    for piece in request["pieces"]:
        write(piece.encode())


def say_what_is_known(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    known = {"environment": dict(os.environ), "folder": str(Path.cwd()), "path": sys.path}
    write(json.dumps(known).encode())


def read_the_file(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    assert file is not None
    write(file.read())


def measure_the_request(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    write(str(len(request["text"])).encode())


def print_by_chance(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    print("a library says hello")
    write(b"the answer")


def refuse(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    raise Refused(request["why"])


def fail(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    raise LookupError("a name\nand \x1b[31ma colour")


def exit_early(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    sys.exit(0)


def leave_with_a_code(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    os._exit(3)


def crash(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    ctypes.string_at(0)


def allocate(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    hoard = []
    while True:
        hoard.append(bytearray(2**20))


def allocate_a_little(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    write(str(len(bytearray(48 * 2**20))).encode())


def spin(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    while True:
        pass


def sleep(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    write(str(os.getpid()).encode())
    time.sleep(600)


def close_and_sleep(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    os.closerange(0, resource.getrlimit(resource.RLIMIT_NOFILE)[0] + 64)
    time.sleep(600)


def answer_forever(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    while True:
        write(bytes(2**16))


def complain_forever(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    while True:
        os.write(2, b"alas ")


def open_a_new_file(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    Path(request["path"]).with_name("new").write_bytes(b"x")


def read_a_file(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    write(Path(request["path"]).read_bytes())


def grow_an_open_file(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    os.write(request["fd"], b"longer than it was")


def delete_a_file(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    Path(request["path"]).unlink()


def truncate_a_file(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    os.truncate(request["path"], 0)


def connect(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def start_a_program(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    os.execv(sys.executable, [sys.executable, "-c", "print('free')"])


def fork(write: Write, request: dict[str, Any], file: BinaryIO | None) -> None:
    if os.fork() == 0:
        time.sleep(600)
    write(b"forked")
