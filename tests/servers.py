"""Servers on 127.0.0.1: an S3 server behind a proxy that misbehaves on request, a folder over HTTP, a small hub."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from moto.server import ThreadedMotoServer

# drop: hang up without an answer; lose: the same, once the request was carried out; cut: half of the body; flip:
# another last byte; busy: 503; conflict: S3's 409; forbidden: 403.
Fault = Literal["drop", "lose", "cut", "flip", "busy", "conflict", "forbidden"]


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str  # decoded, without the query
    target: str  # as it was sent
    headers: Message
    body: bytes

    @property
    def query(self) -> str:
        return urlsplit(self.target).query


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


REFUSALS = {
    "busy": Answer(503),
    "conflict": Answer(409, b"<Error><Code>ConditionalRequestConflict</Code><Message>at once</Message></Error>"),
    "forbidden": Answer(403),
}


@dataclass(slots=True)
class Server:
    """What was asked of it, and how it is to misbehave."""

    url: str
    behind: str = ""  # the URL of the server behind a proxy
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request], Fault | None] = lambda _: None
    faults: list[tuple[Fault, Request]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def meet(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            fault = self.fault(request)
            if fault:
                self.faults.append((fault, request))
            return fault


class _Listening(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            super().handle_error(request, address)


@contextmanager
def serving(answer: Callable[[Request], Answer]) -> Iterator[Server]:
    """A server whose answers come from `answer`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:  # the client has died
                self.close_connection = True
                return
            request = Request(self.command, unquote(urlsplit(self.path).path), self.path, self.headers, body)
            fault = server.meet(request)
            result = None if fault == "drop" else REFUSALS.get(fault or "") or answer(request)
            if result is None or fault == "lose":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(result.status)
            for name, value in {"Content-Length": str(len(result.body)), **result.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(spoilt(result.body, fault))
            if fault == "cut":
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = respond  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with _Listening(("127.0.0.1", 0), Handler) as listening:
        server = Server(f"http://127.0.0.1:{listening.server_address[1]}")
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()


def spoilt(body: bytes, fault: Fault | None) -> bytes:
    if fault == "cut":
        return body[: len(body) // 2]
    return body[:-1] + bytes([body[-1] ^ 1]) if fault == "flip" else body


@contextmanager
def s3() -> Iterator[Server]:
    """moto's S3 server, behind a proxy."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()

    def forward(request: Request) -> Answer:
        connection = http.client.HTTPConnection(host, port, timeout=20)
        try:
            headers = {name: value for name, value in request.headers.items() if name.lower() != "connection"}
            connection.request(request.method, request.target, request.body, headers)
            response = connection.getresponse()
            body = response.read()
            kept = {name: value for name, value in response.getheaders() if name.lower() not in HOP}
            length = {} if request.method != "HEAD" else {"Content-Length": response.getheader("Content-Length") or "0"}
            return Answer(response.status, body, kept | length)
        finally:
            connection.close()

    try:
        with serving(forward) as server:
            server.behind = f"http://{host}:{port}"
            yield server
    finally:
        moto.stop()


# Headers of one connection, not of the answer; the proxy writes its own.
HOP = ("connection", "content-length", "transfer-encoding", "date", "server")


def file_answer(request: Request, body: bytes, headers: dict[str, str]) -> Answer:
    """A file, or the range of it that was asked for."""
    wanted = request.headers.get("Range")
    headers = {"Accept-Ranges": "bytes", **headers}
    if request.method == "HEAD":
        return Answer(200, b"", headers | {"Content-Length": str(len(body))})
    if wanted is None:
        return Answer(200, body, headers)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, stop = int(first), min(int(last or len(body)) + 1, len(body))
    if start >= len(body):
        return Answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
    return Answer(206, body[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"})


@contextmanager
def files(folder: Path) -> Iterator[Server]:
    """The files of `folder` over HTTP."""

    def answer(request: Request) -> Answer:
        file = folder / request.path.lstrip("/")
        if not file.is_file():
            return Answer(404)
        body = file.read_bytes()
        return file_answer(request, body, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    with serving(answer) as server:
        yield server


@contextmanager
def hub(repositories: Mapping[str, Path]) -> Iterator[Server]:
    """A hub with the folders `repositories`, named like `models/someone/encoder` or `datasets/someone/corpus`.

    A change in a folder is a new commit on main; the commits before stay. Large files lie elsewhere, as LFS has them.
    """
    seen = {name: _Repository(folder) for name, folder in repositories.items()}
    large: dict[str, bytes] = {}

    def answer(request: Request) -> Answer:
        if request.path.startswith("/large/"):
            return file_answer(request, large[request.path.removeprefix("/large/")], {})
        api = request.path.startswith("/api/")
        path = request.path.removeprefix("/api/" if api else "/")
        path = path if api or path.startswith("datasets/") else f"models/{path}"
        name = next((name for name in seen if path == name or path.startswith(f"{name}/")), None)
        if name is None:
            return missing("Repo", "Repository not found")
        verb, revision, place = (*path.removeprefix(name).strip("/").split("/", 2), "", "")[:3]
        commit, files = seen[name].at(revision or "main")
        if files is None:
            return missing("Revision", f"Invalid rev id: {revision}")
        if verb == "tree":
            return seen[name].tree(files, place, "recursive=true" in request.query.lower())
        if verb in ("", "revision"):
            info = {"_id": "0", "id": name.partition("/")[2], "sha": commit, "private": False}
            return as_json(info | {"tags": [], "siblings": []})
        if place not in files:
            return missing("Entry", "Entry not found", {"X-Repo-Commit": commit})
        body, headers = files[place], {"X-Repo-Commit": commit, "ETag": f'"{git_hash(files[place])}"'}
        if not place.endswith(LARGE):
            return file_answer(request, body, headers)
        digest = hashlib.sha256(body).hexdigest()
        large[digest] = body
        place = server.url.replace("127.0.0.1", "localhost")  # on its own host a client would ask on for the headers
        link = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body)), "Location": f"{place}/large/{digest}"}
        return Answer(302, b"", headers | link)

    with serving(answer) as server:
        yield server


LARGE = (".safetensors", ".ckpt", "tokenizer.json")


@dataclass(slots=True)
class _Repository:
    folder: Path
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, bytes] | None]:
        """The commit that `revision` stands for, and its files."""
        if revision != "main":
            return revision, self.commits.get(revision)
        found = {f.relative_to(self.folder).as_posix(): f for f in sorted(self.folder.rglob("*")) if f.is_file()}
        files = {name: file.read_bytes() for name, file in found.items()}
        listing = repr([(name, git_hash(body)) for name, body in files.items()])
        commit = hashlib.sha1(f"{self.folder}{listing}".encode()).hexdigest()
        self.commits[commit] = files
        return commit, files

    def tree(self, files: Mapping[str, bytes], place: str, recursive: bool) -> Answer:
        prefix = f"{place}/" if place else ""
        inside = [name for name in files if name.startswith(prefix)]
        if not inside:
            return missing("Entry", "no such folder")
        folders = {"/".join(name.split("/")[:depth]) for name in inside for depth in range(1, name.count("/") + 1)}
        names = {*inside, *(folder for folder in folders if folder.startswith(prefix))}
        return as_json([
            _entry(name, files.get(name))
            for name in sorted(names)
            if recursive or "/" not in name.removeprefix(prefix)
        ])  # fmt: skip


def _entry(path: str, body: bytes | None) -> dict[str, object]:
    if body is None:
        return {"type": "directory", "oid": git_hash(path.encode()), "size": 0, "path": path}
    entry: dict[str, object] = {"type": "file", "oid": git_hash(body), "size": len(body), "path": path}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
    return entry


def git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def missing(what: str, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(404, json.dumps({"error": message}).encode(), {"X-Error-Code": f"{what}NotFound", **(headers or {})})


def as_json(value: object) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})
