"""What the stand-in of the Hub keeps, and its answer to each request that huggingface_hub makes."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

_ID = r"(?P<repo>[^/]+(?:/[^/]+)?)"
# Repositories of datasets are kept under an id that begins with `datasets/`.
_DATASET = r"(?P<repo>datasets/[^/]+/[^/]+)"


class Request(NamedTuple):
    """One request as it came in; the names of its headers are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]


class Reply(NamedTuple):
    """What goes back; of `body` only the first `sent` bytes, when that is given, before the connection drops."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}
    sent: int | None = None

    @classmethod
    def of_json(cls, value: Any, status: int = 200) -> Self:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @classmethod
    def error(cls, status: int, code: str, message: str) -> Self:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        return cls(status, json.dumps({"error": message}).encode(), headers)


@dataclass
class Repo:
    """A repository: its commits, oldest first, each a whole tree of files."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: Mapping[str, bytes], message: str) -> str:
        digest = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode())
        for name in sorted(files):
            digest.update(files[name])
        self.commits[digest.hexdigest()] = dict(files)
        self.messages.append(message)
        return digest.hexdigest()


@dataclass
class Content:
    """All that is kept: repositories by id, and uploaded large files by their sha256."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".model", ".bin"))


def _oid(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_lfs(path) else _git_oid(data)


def _info(kept: Content, parts: dict[str, str], request: Request, body: bytes) -> Reply:
    repo = kept.repos[parts["repo"]]
    siblings = [{"rfilename": name} for name in repo.commits[parts["commit"]]]
    return Reply.of_json(
        {
            "id": parts["repo"].removeprefix("datasets/"),
            "sha": parts["commit"],
            "private": repo.private,
            "tags": [],
            "siblings": siblings,
        }
    )


def _tree(kept: Content, parts: dict[str, str], request: Request, body: bytes) -> Reply:
    entries = []
    for path, data in kept.repos[parts["repo"]].commits[parts["commit"]].items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
        if _is_lfs(path):
            entry["lfs"] = {"oid": _oid(path, data), "size": len(data), "pointerSize": 130}
        entries.append(entry)
    return Reply.of_json(entries)


def _file(kept: Content, parts: dict[str, str], request: Request, body: bytes) -> Reply:
    files = kept.repos[parts["repo"]].commits[parts["commit"]]
    if parts["path"] not in files:
        return Reply.error(404, "EntryNotFound", "Entry not found")
    data = files[parts["path"]]
    headers = {"ETag": f'"{_oid(parts["path"], data)}"', "X-Repo-Commit": parts["commit"], "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
    if wanted is None:
        return Reply(200, data, headers)
    start = int(wanted[1])
    return Reply(206, data[start:], headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})


def _create(kept: Content, parts: dict[str, str], request: Request, body: bytes) -> Reply:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    reply = {"url": f"{kept.url}/{name}", "name": name}
    if name in kept.repos:
        return Reply.of_json({"error": "You already created this model repo", **reply}, 409)
    kept.repos[name] = Repo(private=asked.get("visibility") == "private")
    kept.repos[name].commit({".gitattributes": b""}, "initial commit")
    return Reply.of_json(reply)


def _validate_yaml(kept: Content, parts: dict[str, str], request: Request, body: bytes) -> Reply:
    return Reply.of_json({"errors": [], "warnings": []})


def _preupload(kept: Content, parts: dict[str, str], request: Request, body: bytes) -> Reply:
    there = kept.repos[parts["repo"]].files
    files = []
    for asked in json.loads(body)["files"]:
        path = asked["path"]
        entry = {"path": path, "uploadMode": "lfs" if _is_lfs(path) else "regular", "shouldIgnore": False}
        files.append(entry | ({"oid": _oid(path, there[path])} if path in there else {}))
    return Reply.of_json({"files": files})


def _lfs_batch(kept: Content, parts: dict[str, str], request: Request, body: bytes) -> Reply:
    objects = []
    for asked in json.loads(body)["objects"]:
        upload = {"upload": {"href": f"{kept.url}/lfs/{asked['oid']}"}}
        objects.append(asked | ({} if asked["oid"] in kept.objects else {"actions": upload}))
    return Reply.of_json({"transfer": "basic", "objects": objects})


def _lfs_put(kept: Content, parts: dict[str, str], request: Request, body: bytes) -> Reply:
    if hashlib.sha256(body).hexdigest() != parts["oid"]:
        return Reply.error(400, "", "The bytes do not have the announced sha256")
    kept.objects[parts["oid"]] = body
    return Reply()


def _commit(kept: Content, parts: dict[str, str], request: Request, body: bytes) -> Reply:
    header, *operations = [json.loads(line) for line in body.splitlines()]
    repo = kept.repos[parts["repo"]]
    files = dict(repo.files)
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            assert operation["key"] == "lfsFile", operation["key"]
            files[value["path"]] = kept.objects[value["oid"]]
    oid = repo.commit(files, header["value"]["summary"])
    return Reply.of_json({"commitUrl": f"{kept.url}/{parts['repo']}/commit/{oid}", "commitOid": oid})


ROUTES = (
    ("GET", rf"/api/{_DATASET}/revision/(?P<revision>[^/]+)", _info),
    ("GET", rf"/api/{_DATASET}/tree/(?P<revision>[^/]+)", _tree),
    ("GET", rf"/api/{_DATASET}", _info),
    ("GET HEAD", rf"/{_DATASET}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _file),
    ("GET", rf"/api/models/{_ID}/revision/(?P<revision>[^/]+)", _info),
    ("GET", rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)", _tree),
    ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>[^/]+)", _preupload),
    ("POST", rf"/api/models/{_ID}/commit/(?P<revision>[^/]+)", _commit),
    ("GET", rf"/api/models/{_ID}", _info),
    ("POST", r"/api/repos/create", _create),
    ("POST", r"/api/validate-yaml", _validate_yaml),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _lfs_put),
    ("GET HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _file),
)
