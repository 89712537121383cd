"""Servers on 127.0.0.1: an S3 server behind a proxy that misbehaves on request, a folder over HTTP, a small hub."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from moto.server import ThreadedMotoServer

# drop: hang up without an answer; cut: half of the body; busy: 503; forbidden: 403.
Fault = Literal["drop", "cut", "busy", "forbidden"]


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
            if fault == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            result = {"busy": Answer(503), "forbidden": Answer(403)}.get(fault or "") or answer(request)
            self.send_response(result.status)
            for name, value in {"Content-Length": str(len(result.body)), **result.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(result.body[: len(result.body) // 2] if fault == "cut" else result.body)
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
def hub(folder: Path, repository: str) -> Iterator[Server]:
    """A hub with one dataset repository, whose files are those of `folder`."""
    commit = hashlib.sha1(repository.encode()).hexdigest()
    api = f"/api/datasets/{repository}"

    def entry(file: Path) -> dict[str, object]:
        path = file.relative_to(folder).as_posix()
        oid = hashlib.sha1(file.read_bytes() if file.is_file() else path.encode()).hexdigest()
        if file.is_dir():
            return {"type": "directory", "oid": oid, "size": 0, "path": path}
        return {"type": "file", "oid": oid, "size": file.stat().st_size, "path": path}

    def tree(request: Request) -> Answer:
        place = folder / request.path.removeprefix(f"{api}/tree/main").lstrip("/")
        if not place.is_dir():
            return Answer(404, b'{"error":"no such folder"}', {"X-Error-Code": "EntryNotFound"})
        found = place.rglob("*") if "recursive=true" in request.query.lower() else place.glob("*")
        return as_json([entry(file) for file in sorted(found)])

    def answer(request: Request) -> Answer:
        if request.path in (api, f"{api}/revision/main"):
            return as_json({"_id": "0", "id": repository, "sha": commit, "private": False, "tags": [], "siblings": []})
        if request.path == f"{api}/tree/main" or request.path.startswith(f"{api}/tree/main/"):
            return tree(request)
        file = folder / request.path.removeprefix(f"/datasets/{repository}/resolve/main/")
        if request.path.startswith(f"/datasets/{repository}/resolve/main/") and file.is_file():
            return file_answer(request, file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{entry(file)["oid"]}"'})
        return Answer(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    with serving(answer) as server:
        yield server


def as_json(value: object) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})
