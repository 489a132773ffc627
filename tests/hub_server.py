"""A small Hub on this machine, for the real `huggingface_hub` client to talk to over HTTP.

It serves what the client asks for when it reads a model (commits, file trees, files whole or in ranges) and when it
writes one: repositories, branches, LFS uploads, commits, pull requests. A commit is a folder. Private repositories
want the token, gated ones refuse, organisations other than `org` may not be written to. With `xet` it also takes
uploads to Xet storage, whose contents it does not unpack: it keeps "xet SHA256" in place of such a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    import pytest

TOKEN = "hf_the_right_token"
READ_ONLY = "hf_the_read_token"
XET = "a_token_for_storage"


class Repository:
    """Its branches, tags and pull requests by name, each on a commit, and the folder of each commit."""

    def __init__(self, revisions: dict[str, Path], private: bool = False, gated: bool = False) -> None:
        self.private, self.gated = private, gated
        self.tags: set[str] = set()
        self.heads: dict[str, str] = {}
        self.folders: dict[str, Path] = {}
        for name, folder in revisions.items():
            self.move(name, folder, hashlib.sha1(name.encode()).hexdigest())

    def move(self, name: str, folder: Path, commit: str) -> None:
        """Let a branch point to a new commit."""
        self.heads[name], self.folders[commit] = commit, folder

    def commit(self, revision: str) -> str | None:
        """The commit (forty hex digits) of a branch, a tag or a commit."""
        return self.heads.get(revision) or (revision if revision in self.folders else None)

    def folder(self, revision: str) -> Path:
        """The files at a revision."""
        return self.folders[self.commit(revision) or ""]


@dataclass
class Hub:
    """A running server: its address, its repositories, and the (method, path) of every request it got.

    `failures` maps a pattern of "METHOD path" to how many more such requests are answered with an error 500.
    """

    endpoint: str
    repositories: dict[str, Repository]
    storage: Path
    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    xet: bool = False
    descriptions: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def downloaded(self) -> set[str]:
        """Names of the files whose content was fetched."""
        return {path.rsplit("/", 1)[1] for method, path in self.requests if method == "GET" and "/resolve/" in path}

    def count(self, pattern: str) -> int:
        """How many requests, as "METHOD path", match."""
        return sum(bool(re.search(pattern, f"{method} {path}")) for method, path in self.requests)

    def fails(self, request: str) -> bool:
        with self.lock:
            for pattern, left in self.failures.items():
                if left and re.search(pattern, request):
                    self.failures[pattern] -= 1
                    return True
        return False


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.path_, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self._read()
        self.hub.requests.append((self.command, self.path_))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.hub.fails(f"{self.command} {self.path_}"):
            return self._fail(500, "")
        if token not in ("", TOKEN, READ_ONLY, XET):
            return self._fail(401, "", {"X-Error-Message": "Invalid credentials in Authorization header"})
        found = _route(self.command, self.path_)
        if found is None:
            return self._fail(404, "RepoNotFound")
        match, verb, reads = found
        named = match.groupdict().get("repo")
        repository = self.hub.repositories.get(named or "")
        if named and (repository is None or (repository.private and not token)):
            return self._fail(404, "RepoNotFound")
        if not reads and not token:
            return self._fail(401, "", {"X-Error-Message": "Invalid username or password."})
        if not reads and (token == READ_ONLY or (named and not named.startswith("org/"))):
            return self._fail(403, "", {"X-Error-Message": "You need write access"})
        self.revision = match.groupdict().get("rev") or "main"
        if repository and repository.commit(self.revision) is None:
            return self._fail(404, "RevisionNotFound")
        # Only the routes that name a repository read it.
        self.name, self.repository = named or "", repository or Repository({})
        getattr(self, verb)(match)

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = _answer

    # Reading

    def info(self, _: re.Match[str]) -> None:
        facts = {"id": self.name, "sha": self.repository.commit(self.revision), "private": self.repository.private}
        self._json({**facts, "siblings": []})

    def refs(self, _: re.Match[str]) -> None:
        lists: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": []}
        for name, commit in self.repository.heads.items():
            kind = "tags" if name in self.repository.tags else "branches"
            lists[kind].append({"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit})
        self._json(lists)

    def tree(self, _: re.Match[str]) -> None:
        folder = self.repository.folder(self.revision)
        self._json([_row(folder, name) for name in _names(folder)])

    def resolve(self, match: re.Match[str]) -> None:
        if self.repository.gated:
            return self._fail(403, "GatedRepo")
        commit = {"X-Repo-Commit": self.repository.commit(self.revision) or ""}
        folder = self.repository.folder(self.revision)
        if not (folder / match["file"]).is_file():
            return self._fail(404, "EntryNotFound", commit)
        self._send(
            (folder / match["file"]).read_bytes(), commit | {"ETag": f'"{_row(folder, match["file"])["oid"]}"'}
        )

    # Writing

    def create(self, _: re.Match[str]) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "org":
            return self._fail(403, "", {"X-Error-Message": "You don't have the rights to create a model there"})
        if name in self.hub.repositories:
            return self._fail(409, "")
        folder = self.hub.storage / "empty"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = Repository({"main": folder}, private=private)
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name})

    def validate(self, _: re.Match[str]) -> None:
        self._json({"errors": [], "warnings": []})

    def branch(self, match: re.Match[str]) -> None:
        start = self.repository.heads["main"]
        self.repository.move(match["branch"], self.repository.folders[start], start)
        self._json({})

    def preupload(self, _: re.Match[str]) -> None:
        folder = self.repository.folder(self.revision)
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            oid = _oid(folder / file["path"], mode) if (folder / file["path"]).is_file() else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def batch(self, match: re.Match[str]) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            found = {"oid": asked["oid"], "size": asked["size"]}
            if not self._object(asked["oid"]).exists():
                href = f"{self.hub.endpoint}/lfs/{asked['oid']}"
                found["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(found)
        self._json({"transfer": "basic", "objects": objects})

    def put(self, match: re.Match[str]) -> None:
        if hashlib.sha256(self.body).hexdigest() != match["oid"]:
            return self._fail(400, "")
        self._object(match["oid"]).write_bytes(self.body)
        self._json({})

    def verify(self, match: re.Match[str]) -> None:
        size = self._object(match["oid"]).stat().st_size
        return self._json({}) if json.loads(self.body)["size"] == size else self._fail(422, "")

    def commit(self, _: re.Match[str]) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        number = sum(self.command == method and "/commit/" in path for method, path in self.hub.requests)
        folder = shutil.copytree(self.repository.folder(self.revision), self.hub.storage / f"commit-{number}")
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.descriptions.append(value["description"])
                continue
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile" and self.hub.xet:
                path.write_text(f"xet {value['oid']}")
            elif line["key"] == "lfsFile":
                shutil.copyfile(self._object(value["oid"]), path)
            elif line["key"] == "deletedFile":
                path.unlink()
        commit = hashlib.sha1(f"{self.name} {number}".encode()).hexdigest()
        answer = {"commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{self.name}/commit/{commit}"}
        if "create_pr" in self.query:
            self.revision = "refs/pr/1"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{self.name}/discussions/1"
        self.repository.move(self.revision, folder, commit)
        self._json(answer)

    def xet_token(self, _: re.Match[str]) -> None:
        if not self.hub.xet:
            return self._fail(404, "")
        self._json({"casUrl": self.hub.endpoint, "exp": 4_000_000_000, "accessToken": XET})

    def xet_store(self, match: re.Match[str]) -> None:
        # A 404 to its other questions makes the client use the first version of the protocol.
        known = {"xorbs": {"was_inserted": True}, "shards": {"result": 1}}
        self._json(known[match["kind"]]) if match["kind"] in known else self._fail(404, "")

    def _object(self, oid: str) -> Path:
        (self.hub.storage / "objects").mkdir(parents=True, exist_ok=True)
        return self.hub.storage / "objects" / oid

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}, status)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        size = len(body)
        if span and status == 200:
            first, last = int(span[1]), min(int(span[2] or size - 1), size - 1)
            body, status = body[first : last + 1], 206
            headers = {**(headers or {}), "Content-Range": f"bytes {first}-{last}/{size}"}
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


REPO, REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>refs/pr/\d+|feature/[^/]+|[^/]+)"
API = f"/api/models/{REPO}"
# Method, path, the handler, and whether the handler only reads.
ROUTES = [
    *((method, f"/{REPO}/resolve/{REV}/(?P<file>.+)", "resolve", True) for method in ("GET", "HEAD")),
    ("GET", API, "info", True),
    ("GET", f"{API}/revision/{REV}", "info", True),
    ("GET", f"{API}/refs", "refs", True),
    ("GET", f"{API}/tree/{REV}(/.*)?", "tree", True),
    ("POST", "/api/validate-yaml", "validate", True),
    ("POST", "/api/repos/create", "create", False),
    ("POST", f"{API}/branch/(?P<branch>.+)", "branch", False),
    ("POST", f"{API}/preupload/{REV}", "preupload", False),
    ("POST", f"{API}/commit/{REV}", "commit", False),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch", False),
    ("GET", f"{API}/xet-write-token/{REV}", "xet_token", False),
    *((method, "/v1/(?P<kind>[^/]+)(/.*)?", "xet_store", True) for method in ("GET", "POST")),
    # As at the Hub's own storage, the address of an upload is its permission.
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "put", True),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", "verify", False),
]


def _route(method: str, path: str) -> tuple[re.Match[str], str, bool] | None:
    """Return the match of a path, its handler, and whether the handler only reads; None without a route."""
    for wanted, pattern, verb, reads in ROUTES:
        match = re.fullmatch(pattern, path) if wanted == method else None
        if match:
            return match, verb, reads
    return None


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _row(folder: Path, name: str) -> dict[str, object]:
    content = (folder / name).read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _oid(path: Path, mode: str) -> str:
    content = path.read_bytes()
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(repositories: dict[str, Repository], storage: Path | None = None) -> Iterator[Hub]:
    """Run a Hub with these repositories until the block ends; `storage` is an empty folder for what is written."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories, storage or Path("/nonexistent"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        server.server_close()


def point_client_to(monkeypatch: pytest.MonkeyPatch, hub: Hub, cache: Path) -> None:
    """Let this process's `huggingface_hub` talk to `hub` and keep its files in `cache`.

    The client reads HF_ENDPOINT and HF_HOME once, when it is imported.
    """
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    for name in ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def main() -> None:
    """Run a command beside a Hub of its own: python -m tests.hub_server FOLDER COMMAND [ARGUMENT ...]."""
    folder, *command = sys.argv[1:]
    Path(folder).mkdir(parents=True)
    with serve({}, Path(folder)) as hub:
        client = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": f"{folder}/home"}
        environment = {**os.environ, **client, "HF_HUB_DISABLE_XET": "1"}
        code = subprocess.run(command, env=environment, check=False).returncode
        for name, repository in hub.repositories.items():
            files = sorted(path.name for path in repository.folder("main").rglob("*") if path.is_file())
            print(f"On the Hub: {name}: {', '.join(files)}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
