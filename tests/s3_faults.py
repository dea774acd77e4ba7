"""An HTTP proxy in front of a real S3 server that answers chosen requests wrongly, late or not at all.

    with FaultyS3(server) as faulty:
        faulty.plan("503", times=3, method="PUT")           # the next three PUTs
        faulty.plan("drop_reply", method="POST", path="uploadId")
        store = open_store(server.url("x", endpoint=faulty.endpoint))

What each does: ``500`` ``503`` ``429`` ``403`` ``expired`` ``region`` ``no_bucket`` answer so without asking the server;
``no_conditions`` and ``no_checksums`` answer 501 to requests with such a header; ``ignore_conditions`` overwrites in spite of
If-None-Match; ``drop_reply`` and ``reset`` close the connection after and before the effect; ``hang`` never answers; ``truncate`` and
``flip`` damage the answer's body, ``damage`` the request's.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import urllib.parse
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from tests.servers import SeaweedServer

_ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "429": (429, "TooManyRequests"),
    "403": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "region": (301, "PermanentRedirect"),
    "no_bucket": (404, "NoSuchBucket"),
    "no_conditions": (501, "NotImplemented"),
    "no_checksums": (501, "NotImplemented"),
}
_HEADERS = {"no_conditions": "If-None-Match", "no_checksums": "x-amz-checksum-crc64nvme", "ignore_conditions": "If-None-Match"}


@dataclass
class Fault:
    action: str
    times: int
    method: str
    path: str

    def meets(self, handler: BaseHTTPRequestHandler) -> bool:
        wanted = _HEADERS.get(self.action)
        return (
            self.times > 0
            and self.method in {"", handler.command}
            and self.path in handler.path
            and (wanted is None or wanted in handler.headers)
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client went away
            super().handle()

    def _serve(self) -> None:
        action = self.server.faulty._take(self)
        if action == "hang":
            self.server.faulty.released.wait(60)
        if action in {"reset", "hang"}:
            self._cut(reset=True)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if action in _ERRORS:
            self._error(*_ERRORS[action])
            return
        if action == "damage":
            body = _flipped(body)
        if action == "ignore_conditions":  # the header is signed, so it cannot be taken out: the object is, which comes to the same
            self.server.faulty.remove(self.path)
        status, headers, content = self._forward(body)
        if action == "drop_reply":
            self._cut(reset=False)
            return
        if action == "flip":
            content = _flipped(content)
        self._reply(status, headers, content, cut_at=len(content) // 2 if action == "truncate" else None)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.faulty.server_port, timeout=60)
        with contextlib.closing(upstream):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"expect", "connection"}:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()

    def _reply(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut_at: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"transfer-encoding", "connection"} and (name.lower() != "content-length" or self.command == "HEAD"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut_at])
        if cut_at is not None:
            self._cut(reset=False)

    def _error(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self._reply(status, [("Content-Type", "application/xml"), ("x-amz-bucket-region", "eu-elsewhere-1")], text)

    def _cut(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else content


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    faulty: FaultyS3

    def handle_error(self, request: object, client_address: object) -> None:
        """A cut connection is what a test asked for."""


class FaultyS3:
    """The proxy; ``requests`` are the lines it has seen, ``met`` the faults that happened."""

    def __init__(self, server: SeaweedServer) -> None:
        self.server_port = server.port
        self._upstream = server
        self.requests: list[str] = []
        self.met: list[str] = []
        self.released = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.faulty = self
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="faulty-s3", daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def plan(self, action: str, *, times: int = 1, method: str = "", path: str = "") -> None:
        """The next ``times`` requests of this method whose path and query hold ``path`` meet this fault."""
        with self._lock:
            self._faults.append(Fault(action, times, method, path))

    def forget(self) -> None:
        """Behave from now on, and count anew."""
        with self._lock:
            for seen in (self._faults, self.requests, self.met):
                seen.clear()

    def _take(self, handler: BaseHTTPRequestHandler) -> str:
        with self._lock:
            self.requests.append(f"{handler.command} {handler.path}")
            for fault in self._faults:
                if fault.meets(handler):
                    fault.times -= 1
                    self.met.append(fault.action)
                    return fault.action
        return ""

    def remove(self, path: str) -> None:
        """Delete an object by the path of a request."""
        key = urllib.parse.unquote(path.partition("?")[0]).removeprefix(f"/{self._upstream.bucket}/")
        self._upstream.client().delete_object(Bucket=self._upstream.bucket, Key=key)

    def count(self, text: str) -> int:
        """How many requests held this text."""
        with self._lock:
            return sum(text in line for line in self.requests)

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
