"""A TCP proxy that misbehaves on demand; its mode is switched while connections are open.

    with Proxy(server.port) as proxy:
        client = redis.Redis(port=proxy.port)
        proxy.drop_replies(1, matching=b"EVALSHA")   # the effect happens, its reply is lost

Modes: ``pass``; ``blackhole`` (connections are accepted, nothing passes either way); ``drop_replies`` (what the client sends
reaches the server, no reply comes back); ``reset`` (every connection gets a RST); ``refuse`` (nobody listens).
``delay_s`` delays each chunk, each way, in every mode.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Literal, Self

Mode = Literal["pass", "blackhole", "drop_replies", "reset", "refuse"]
_CHUNK = 1 << 16
_RST = struct.pack("ii", 1, 0)


class _Link:
    """One client's connection and ours to the server, with what the reply in progress is to become."""

    def __init__(self, client: socket.socket, server: socket.socket | None) -> None:
        self.client, self.server = client, server
        self.request = b""  # what the client sent since the last reply began
        self.replying = False
        self.swallowing = False

    def close(self, *, reset: bool = False) -> None:
        for side in (self.client, self.server):
            if side is None:
                continue
            with contextlib.suppress(OSError):
                if reset:
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
                else:
                    side.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                side.close()


class Proxy:
    """Listens on ``port`` of 127.0.0.1 (a free one) and forwards to ``server_port``."""

    def __init__(self, server_port: int, *, host: str = "127.0.0.1") -> None:
        self._upstream = (host, server_port)
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._mode: Mode = "pass"
        self._to_drop = 0
        self._drop_matching = b""
        self._drop_then: Literal["hang", "close"] = "hang"
        self._closed = False
        self.delay_s = 0.0
        self.dropped = 0  # replies swallowed by drop_replies(n) so far
        self.accepted = 0  # connections so far
        self._listener: socket.socket | None = None
        self.port = 0
        self._listen()

    # --- what a test says ---

    @property
    def mode(self) -> Mode:
        return self._mode

    def set_mode(self, mode: Mode) -> None:
        """From now on, for open and for new connections."""
        self._mode = mode
        if mode == "refuse":
            self._stop_listening()
        else:
            self._listen()
        if mode in {"reset", "refuse"}:
            self.reset_connections()

    def drop_replies(self, count: int = 1, *, matching: bytes = b"", then: Literal["hang", "close"] = "hang") -> None:
        """Swallow exactly the next ``count`` replies to requests that hold the bytes ``matching``, in mode ``pass``.

        A reply is all that the server sends between two requests (so the answers to one pipeline are one reply; an interim
        ``100 Continue`` is none). Afterwards the connection hangs until the client's next request, or is closed.
        """
        with self._lock:
            self._to_drop, self._drop_matching, self._drop_then = count, matching, then
            self.dropped = 0

    def reset_connections(self) -> None:
        """RST to every connection that is open now; new ones are treated by the mode."""
        for link in self._snapshot():
            link.close(reset=True)

    def half_open(self) -> None:
        """The server's side of every open connection is closed; the client's side stays open and is never told."""
        for link in self._snapshot():
            server, link.server = link.server, None
            if server is not None:
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
                server.close()

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._snapshot())

    def close(self) -> None:
        self._closed = True
        self._stop_listening()
        for link in self._snapshot():
            link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- how it is done ---

    def _snapshot(self) -> list[_Link]:
        with self._lock:
            return list(self._links)

    def _listen(self) -> None:
        if self._listener is not None:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(512)
        self._listener, self.port = listener, listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), name=f"proxy-{self.port}", daemon=True).start()

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # close alone leaves accept() waiting
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(client,), name=f"proxy-{self.port}-link", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(client, None)
        with self._lock:
            self._links.add(link)
        try:
            if self._mode == "reset" or self._closed:
                link.close(reset=True)
                return
            if self._mode != "blackhole":
                link.server = socket.create_connection(self._upstream, timeout=10)
                link.server.settimeout(None)
                link.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._replies, args=(link, link.server), name=f"proxy-{self.port}-back", daemon=True).start()
            self._requests(link)
        except OSError:
            pass  # either side ended; both are closed below
        finally:
            with self._lock:
                self._links.discard(link)
            link.close()

    def _requests(self, link: _Link) -> None:
        while chunk := link.client.recv(_CHUNK):
            self._delay()
            if self._mode == "blackhole" or link.server is None:
                continue
            with self._lock:
                if link.replying:
                    link.request, link.replying, link.swallowing = b"", False, False
                link.request = (link.request + chunk)[-(1 << 20) :]
            link.server.sendall(chunk)

    def _replies(self, link: _Link, server: socket.socket) -> None:
        try:
            while chunk := server.recv(_CHUNK):
                self._delay()
                if self._lets_through(link, chunk):
                    link.client.sendall(chunk)
        except OSError:
            pass  # the other pump or the test closed it
        if link.server is not None:  # not half-open: the client is told that the server has ended
            link.close()

    def _lets_through(self, link: _Link, chunk: bytes) -> bool:
        if self._mode in {"blackhole", "drop_replies"}:
            return False
        with self._lock:
            if not link.replying and not chunk.startswith(b"HTTP/1.1 100"):
                link.replying = True
                if self._to_drop and self._drop_matching in link.request:
                    self._to_drop -= 1
                    self.dropped += 1
                    link.swallowing = True
            swallowing = link.swallowing
        if swallowing and self._drop_then == "close":
            link.close()
        return not swallowing

    def _delay(self) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)
