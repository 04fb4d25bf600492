"""An HTTP server of a folder's files, in threads of this process: ranges, a listing, and failures on request."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ObjectServer:
    """Serves `root`.

    Attributes:
        url: address of the folder, without a slash at its end.
        faults: what the next requests get: a status, `drop` (the connection ends in the middle of the answer), `whole`
            (the file, whatever range is asked for), or `late` (no answer for a second).
        requests: method, path and range of each request.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: list[str | int] = []
        self.requests: list[tuple[str, str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._released = threading.Event()

    @contextmanager
    def running(self) -> Iterator[ObjectServer]:
        self._thread.start()
        try:
            yield self
        finally:
            self._released.set()
            self._server.shutdown()
            self._server.server_close()

    def wait(self) -> None:
        self._released.wait(1)


class _Handler(BaseHTTPRequestHandler):
    owner: ObjectServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        asked = self.headers.get("Range", "")
        path = self.path.partition("?")[0]
        self.owner.requests.append((self.command, path, asked))
        fault = self.owner.faults.pop(0) if self.owner.faults else None
        if fault == "late":
            self.owner.wait()
        if isinstance(fault, int):
            self._send(fault, b"no")
            return
        file = self.owner.root / path.lstrip("/")
        if path.endswith("/") and file.is_dir():
            links = "".join(f'<a href="{entry.name}">x</a>' for entry in file.iterdir())
            self._send(200, links.encode(), {"Content-Type": "text/html"})
            return
        if not file.is_file():
            self._send(404, b"")
            return
        body = file.read_bytes()
        headers = {"ETag": hashlib.sha1(body).hexdigest(), "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if span is None or fault == "whole":
            self._send(200, body, headers, cut=fault == "drop")
        elif int(span[1]) >= len(body):
            self._send(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        else:
            part = body[int(span[1]) : int(span[2]) + 1]
            headers["Content-Range"] = f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(body)}"
            self._send(206, part, headers, cut=fault == "drop")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


@contextmanager
def serving(root: Path) -> Iterator[ObjectServer]:
    with ObjectServer(root).running() as server:
        yield server
