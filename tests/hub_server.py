"""A small Hub on this machine, for the real `huggingface_hub` client to talk to over HTTP.

It serves what the client asks for when it reads a model: the repository's commit, its file tree, and its files
whole or in ranges. A repository is a folder per revision; private ones want the token, gated ones refuse.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_the_right_token"


@dataclass
class Repository:
    """`revisions` maps a branch or tag to the folder with its files."""

    revisions: dict[str, Path]
    private: bool = False
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit (forty hex digits) of a branch, a tag or a commit."""
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def folder(self, commit: str) -> Path:
        return next(path for name, path in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Hub:
    """A running server: its address, its repositories, and the (method, path) of every request it got."""

    endpoint: str
    repositories: dict[str, Repository]
    requests: list[tuple[str, str]] = field(default_factory=list)

    def downloaded(self) -> set[str]:
        """Names of the files whose content was fetched."""
        return {path.rsplit("/", 1)[1] for method, path in self.requests if method == "GET" and "/resolve/" in path}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        match = re.fullmatch(
            r"/(?P<api>api/models/)?(?P<repo>[^/]+/[^/]+)/(?P<verb>resolve|revision|tree)/(?P<rev>[^/]+)(/(?P<file>.+))?",
            path,
        )
        repository = self.hub.repositories.get(match["repo"]) if match else None
        if self.headers.get("Authorization") and not self._has_token():
            return self._fail(401, "", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if match is None or repository is None or (repository.private and not self._has_token()):
            return self._fail(404, "RepoNotFound")
        commit = repository.commit(match["rev"])
        if commit is None:
            return self._fail(404, "RevisionNotFound")
        files = repository.folder(commit)
        if match["verb"] == "revision":
            return self._send(json.dumps({"id": match["repo"], "sha": commit, "siblings": []}).encode())
        if match["verb"] == "tree":
            names = sorted(p.relative_to(files).as_posix() for p in files.rglob("*") if p.is_file())
            return self._send(json.dumps([_row(files, name) for name in names]).encode())
        if repository.gated:
            return self._fail(403, "GatedRepo")
        file = files / (match["file"] or "")
        if not file.is_file():
            return self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_row(files, match["file"])["oid"]}"'}
        self._send(file.read_bytes(), headers)

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}, status)

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
        if self.command == "GET":
            self.wfile.write(body)


def _row(folder: Path, name: str) -> dict[str, object]:
    content = (folder / name).read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Run a Hub with these repositories until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()


def point_client_to(monkeypatch, hub: Hub, cache: Path) -> None:
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
