"""Google's XML interface in front of fake-gcs-server, which knows the JSON one: what obstore sends, as Google documents it.

Writes and copies become uploads with ``ifGenerationMatch``, so that the server decides about every precondition; reads and listings
pass. Parts of a multipart upload are kept here until its end, and ``uploads`` shows which are open.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import secrets
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, list[tuple[str, str]], bytes]
_BOUNDARY = f"dtr-{secrets.token_hex(16)}"
_PASSED = {"content-type", "content-range", "etag", "last-modified", "x-goog-generation", "content-length"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client went away
            super().handle()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, content = self.server.gateway.answer(self.command, self.path, dict(self.headers.items()), body)
        self.send_response_only(status)
        self.send_header("Date", self.date_time_string())
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", lengths[0] if self.command == "HEAD" and lengths else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    gateway: GcsGateway

    def handle_error(self, request: object, client_address: object) -> None:
        """A cut connection is what a test asked for."""


def _error(status: int, code: str, message: str = "") -> Answer:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message or code}</Message></Error>"
    return status, [("Content-Type", "application/xml")], text.encode()


class GcsGateway:
    """One server; set ``honours_conditions`` to False for a service that ignores them."""

    def __init__(self, upstream_port: int, *, bucket: str, token: str) -> None:
        self.upstream_port, self.bucket, self.token = upstream_port, bucket, token
        self.honours_conditions = True
        self.uploads: dict[str, dict[int, bytes]] = {}
        self._numbers = itertools.count(1)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.gateway = self
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="gcs-gateway", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        path, _, query = target.partition("?")
        bucket, _, key = urllib.parse.unquote(path).lstrip("/").partition("/")
        headers = {name.lower(): value for name, value in headers.items()}
        if headers.get("authorization") != f"Bearer {self.token}":
            return _error(401, "AuthenticationRequired", "Authentication required.")
        if bucket != self.bucket:
            return _error(404, "NoSuchBucket", "The specified bucket does not exist.")
        options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        if method in {"PUT", "POST"} or "uploadId" in options:
            return self._write(method, key, options, headers, body)
        return self._pass(method, target, headers)

    def _write(self, method: str, key: str, options: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        upload = options.get("uploadId", "")
        if "uploads" in options:
            upload = f"upload-{next(self._numbers)}"
            self.uploads[upload] = {}
            return 200, [], f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>".encode()
        if upload and upload not in self.uploads:
            return _error(404, "NoSuchUpload")
        if method == "DELETE":
            del self.uploads[upload]
            return 204, [], b""
        if upload and "partNumber" in options:
            self.uploads[upload][int(options["partNumber"])] = body
            return 200, [("ETag", f'"{options["partNumber"]}"')], b""
        if upload:
            parts = self.uploads.pop(upload)
            status, found, _ = self._upload(key, b"".join(parts[number] for number in sorted(parts)), condition=False)
            return status, found, b"<CompleteMultipartUploadResult><ETag>whole</ETag></CompleteMultipartUploadResult>"
        condition = headers.get("x-goog-if-generation-match") == "0" and self.honours_conditions
        source = headers.get("x-goog-copy-source")
        return self._copy(source, key, condition=condition) if source else self._upload(key, body, condition=condition)

    def _upload(self, key: str, body: bytes, *, condition: bool) -> Answer:
        query = {"uploadType": "multipart", "name": key, **({"ifGenerationMatch": "0"} if condition else {})}
        target = f"/upload/storage/v1/b/{self.bucket}/o?{urllib.parse.urlencode(query)}"  # of all its kinds of upload, this one heeds it
        line = f"--{_BOUNDARY}\r\nContent-Type: application".encode()
        named = line + b"/json\r\n\r\n" + json.dumps({"name": key}).encode() + b"\r\n"
        whole = named + line + b"/octet-stream\r\n\r\n" + body + f"\r\n--{_BOUNDARY}--".encode()
        status, _, content = self._ask("POST", target, {"Content-Type": f"multipart/related; boundary={_BOUNDARY}"}, whole)
        if status == 412:
            return _error(412, "PreconditionFailed")
        if status != 200:
            return _error(status, "Error", content.decode(errors="replace")[:200])
        found = json.loads(content)
        return 200, [("ETag", f'"{found["etag"]}"'), ("x-goog-generation", str(found["generation"]))], b""

    def _copy(self, source: str, key: str, *, condition: bool) -> Answer:
        """As an upload: the server's own rewrite heeds no precondition."""
        status, _, content = self._ask("GET", urllib.parse.quote("/" + urllib.parse.unquote(source).lstrip("/")), {}, b"")
        return self._upload(key, content, condition=condition) if status == 200 else _error(404, "NoSuchKey")

    def _pass(self, method: str, target: str, headers: dict[str, str]) -> Answer:
        wanted = {"Range": headers["range"]} if "range" in headers else {}
        status, found, content = self._ask(method, target, wanted, b"")
        if status == 404:
            return _error(404, "NoSuchKey", "The specified key does not exist.")
        return status, [(name, value) for name, value in found if name.lower() in _PASSED], content

    def _ask(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=60)) as upstream:
            upstream.request(method, target, body or None, headers)
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()
