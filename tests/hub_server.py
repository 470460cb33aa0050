"""A stand-in of the Hugging Face Hub: as much of its HTTP interface as huggingface_hub uses for models.

It lives on 127.0.0.1 in a thread, keeps its repositories in memory, notes every request, and can be told to fail.
"""

import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from tests.hub_routes import ROUTES, Content, Reply, Repo, Request

MAX_BODY_BYTES = 64 * 2**20


@dataclass
class Fault:
    """Something to go wrong with the next `times` requests whose `METHOD path` matches."""

    pattern: str
    times: int
    reply: Reply | None = None
    drop_after: int = 0


class HubServer:
    """The server, as a context manager. With a `token`, writing and private repositories need it."""

    def __init__(self, *, token: str | None = None) -> None:
        self.token = token
        self.content = Content()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_of_handler = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = self.content.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def repos(self) -> dict[str, Repo]:
        """The repositories by their id."""
        return self.content.repos

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, files: Mapping[str, bytes], *, private: bool = False, gated: bool = False) -> str:
        """Put a commit into a repository, made if need be; returns its hash."""
        kept = self.repos.setdefault(repo, Repo(private, gated))
        return kept.commit(files, "add")

    def fail(self, pattern: str, *, status: int, message: str = "", times: int = 10**6) -> None:
        """Answer the next requests whose `METHOD path` matches the regular expression with an error."""
        self.faults.append(Fault(pattern, times, Reply.error(status, "", message)))

    def answer(self, pattern: str, body: bytes, *, times: int = 10**6) -> None:
        """Answer them with 200 and this body instead."""
        self.faults.append(Fault(pattern, times, Reply(200, body)))

    def drop(self, pattern: str, *, after: int, times: int = 1) -> None:
        """Cut the connection after that many bytes of the body."""
        self.faults.append(Fault(pattern, times, None, after))

    def count(self, pattern: str) -> int:
        """How many requests so far match the regular expression."""
        return sum(re.search(pattern, f"{request.method} {request.path}") is not None for request in self.requests)

    def handle(self, request: Request, body: bytes) -> Reply:
        with self._lock:
            self.requests.append(request)
            fault = self._fault(request)
            if fault is not None and fault.reply is not None:
                return fault.reply
            reply = self._route(request, body)
            return reply if fault is None else reply._replace(sent=fault.drop_after)

    def _fault(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, f"{request.method} {request.path}"):
                fault.times -= 1
                return fault
        return None

    def _route(self, request: Request, body: bytes) -> Reply:
        sent = request.headers.get("authorization")
        if sent is not None and self.token is not None and sent != f"Bearer {self.token}":
            return Reply.error(401, "", "Invalid credentials in Authorization header")
        known = sent is not None or self.token is None
        for methods, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found is None or request.method not in methods.split():
                continue
            # A PUT goes to an address that the batch request handed out, and carries no token.
            if not known and request.method == "POST":
                return Reply.error(401, "", "Unauthorized")
            parts = {key: unquote(value) for key, value in found.groupdict().items()}
            if "repo" not in parts:
                return answer(self.content, parts, request, body)
            repo = self.repos.get(parts["repo"])
            if repo is None or (repo.private and not known):
                return Reply.error(404 if known else 401, "RepoNotFound", "Repository not found")
            if repo.gated:
                return Reply.error(403, "GatedRepo", "Access to this model is restricted")
            parts["commit"] = repo.head if parts.get("revision", "main") == "main" else parts["revision"]
            if parts["commit"] not in repo.commits:
                return Reply.error(404, "RevisionNotFound", f"Invalid rev id: {parts['revision']}")
            return answer(self.content, parts, request, body)
        return Reply.error(404, "", f"The stand-in has no {request.method} {request.path}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    server_of_handler: HubServer

    def _serve(self) -> None:
        body = self._body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server_of_handler.handle(Request(self.command, urlsplit(self.path).path, headers), body)
        self.send_response(reply.status)
        # One request a connection: a pooled connection could outlive its server and meet the next one's port.
        for name, value in {"Content-Length": str(len(reply.body)), "Connection": "close", **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body if reply.sent is None else reply.body[: reply.sent])

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        size = int(self.headers.get("Content-Length") or 0)
        assert size <= MAX_BODY_BYTES, size
        return self.rfile.read(size)

    def log_message(self, *_: object) -> None:
        """Requests are in `HubServer.requests`; nothing is printed."""


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by its relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Put files into a folder, made if need be, and return it."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def closed_port() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
