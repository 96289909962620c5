"""A Hugging Face hub in miniature: the routes and headers that the client relies on, and faults on request.

Two servers, as in the world: the hub answers `/datasets/OWNER/NAME/resolve/REVISION/FILE` and redirects large files to a
storage with another origin, which serves ranges. Xet headers are left out: they are an offer that plain HTTP clients ignore.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest

COMMIT = "c0ffee" * 6 + "c0de"
Headers = dict[str, str]


@dataclass(frozen=True)
class Fault:
    """What to do instead of answering properly: a status, a cut after some bytes, wrong bytes, a pause."""

    status: int = 0
    headers: Headers = field(default_factory=dict)
    cut_after: int = -1
    flip: bool = False
    ignore_range: bool = False
    shift: int = 0
    pause: float = 0.0


class Hub:
    """Files by repository and name; `faults_at_hub` and `faults_at_storage` are used up one a GET or HEAD."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.large: set[str] = set()
        self.gated: set[str] = set()
        self.faults_at_hub: list[Fault] = []
        self.faults_at_storage: list[Fault] = []
        self.requests: list[tuple[str, str, Headers]] = []
        self.served = 0
        self.plain = False  # answers as any web server would, without the hub's headers
        self._servers = [_serve(self, _HubHandler), _serve(self, _StorageHandler)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    def put(self, repo: str, name: str, content: bytes, large: bool = True) -> None:
        self.files[repo, name] = content
        if large:
            self.large.add(name)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other hub, token or proxy than the test's."""
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


class Usage(NamedTuple):
    """What shutil.disk_usage gives."""

    total: int
    used: int
    free: int


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def etag(content: bytes, large: bool) -> str:
    """SHA-256 of large files, git's SHA-1 of the others."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _serve(hub: Hub, handler: type[_Handler]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `requests` instead."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def note(self) -> None:
        self.hub.requests.append((self.command, self.path, dict(self.headers)))

    def reply(self, status: int, headers: Headers, body: bytes = b"", length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def content(self, content: bytes, headers: Headers, fault: Fault) -> None:
        """Content or the range of it that was asked for."""
        start, stop = 0, len(content)
        wanted = self.headers.get("Range")
        if wanted and not fault.ignore_range:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first) + fault.shift, min(len(content), int(last) + 1 if last else len(content))
            if start >= stop:
                self.reply(416, {"Content-Range": f"bytes */{len(content)}"})
                return
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        body = content[start:stop]
        length = len(body)
        if fault.flip:
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault.cut_after >= 0:
            body = body[: fault.cut_after]
        if self.command == "GET":
            self.hub.served += len(body)
        self.reply(206 if "Content-Range" in headers else 200, {**headers, "Accept-Ranges": "bytes"}, body, length)
        if fault.cut_after >= 0:
            self.wfile.flush()
            self.close_connection = True

    def fault(self, faults: list[Fault]) -> Fault | None:
        """The next fault; None when it was answered with its status."""
        fault = faults.pop(0) if faults else Fault()
        if fault.pause:
            threading.Event().wait(fault.pause)
        if fault.status:
            self.reply(fault.status, fault.headers)
            return None
        return fault


class _HubHandler(_Handler):
    def answer(self) -> None:
        if self.path.startswith("/api/"):
            self.reply(404, {})  # the client asks for lists of its own now and then
            return
        self.note()
        fault = self.fault(self.hub.faults_at_hub)
        if fault is None:
            return
        kind, _, rest = self.path.lstrip("/").partition("/")
        repo, _, rest = rest.partition("/resolve/")
        revision, _, name = rest.partition("/")
        name = unquote(name)
        if self.hub.plain:
            self.reply(200, {}, b"<html>log in</html>")
        elif kind != "datasets" or not any(known == repo for known, _ in self.hub.files):
            self.reply(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repo in self.hub.gated and self.headers.get("Authorization") != "Bearer good":
            self.reply(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif revision not in ("main", COMMIT):
            self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        elif (repo, name) not in self.hub.files:
            self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self.file(repo, name, fault)

    def file(self, repo: str, name: str, fault: Fault) -> None:
        content = self.hub.files[repo, name]
        large = name in self.hub.large
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(content, large)}"'}
        if not large:
            self.content(content, headers, fault)
            return
        linked = {"X-Linked-ETag": f'"{etag(content, True)}"', "X-Linked-Size": str(len(content))}
        target = {"Location": f"{self.hub.storage}/{repo}/{name}?signature=of-today"}
        self.reply(302, {"X-Repo-Commit": COMMIT, "ETag": '"of-the-pointer"', **linked, **target})


class _StorageHandler(_Handler):
    def answer(self) -> None:
        self.note()
        fault = self.fault(self.hub.faults_at_storage)
        if fault is None:
            return
        owner, name, path = unquote(self.path.partition("?")[0]).lstrip("/").split("/", 2)
        self.content(self.hub.files[f"{owner}/{name}", path], {"ETag": '"of-the-storage"'}, fault)
