"""The trainer's end of the Unix socket to its launcher: hands over the registration, hears news.

One JSON object a line. To the launcher: a registration (see :func:`registration`), or ``{"leave": true}``. From it: ``{"ok": true}``,
then
``{"news": "stale" | "state_lost" | "run", "incarnation": ..., "detail": TEXT}``. When the launcher goes away the trainer beats for itself.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import orjson

from dtr.errors import Unavailable
from dtr.membership import Identity

__all__ = ["LauncherLink", "registration"]

log = logging.getLogger(__name__)


def registration(who: Identity, *, redis_url: str, job: str, ttl_ms: int, interval_ms: int, number: int, page: str) -> dict[str, Any]:
    """The line that asks the launcher to beat for this member, beginning after beat ``number``."""
    return {
        "v": 1, "redis_url": redis_url, "job": job, "worker_id": who.worker_id, "incarnation": who.incarnation,
        "state_id": who.state_id, "host": who.host, "pid": who.pid, "ttl_ms": ttl_ms, "interval_ms": interval_ms,
        "number": number, "page": page,
    }  # fmt: skip


class LauncherLink:
    """A connection to the launcher.

    Args:
        path: of its Unix socket; None starts a small child, ``python -m worker_agent beat``, that takes the launcher's part.
        on_news: called from a thread with (incarnation, news, detail).
        on_lost: called from that thread when the launcher has gone.
    """

    def __init__(self, path: str | None, *, on_news: Callable[[str, str, str], None], on_lost: Callable[[], None]) -> None:
        self._on_news, self._on_lost = on_news, on_lost
        self._closing = False
        self._child: subprocess.Popen[bytes] | None = None
        if path is None:
            self._socket, self._child = _start_child()
        else:
            self._socket = _connect(path)
        self._file = self._socket.makefile("rb")
        self._thread = threading.Thread(target=self._listen, name="dtr-launcher-link", daemon=True)

    def register(self, line: dict[str, Any]) -> None:
        """Hand over a registration, or a newer one; the first also waits until the launcher has it."""
        try:
            self._socket.sendall(orjson.dumps(line) + b"\n")
            if not self._thread.is_alive():
                answer = orjson.loads(self._file.readline() or b"{}")
                if not answer.get("ok"):
                    raise Unavailable(f"the launcher refused the registration: {answer.get('error', 'no answer')}")
                self._socket.settimeout(None)
                self._thread.start()
        except (OSError, orjson.JSONDecodeError) as exc:
            raise Unavailable(f"the launcher does not answer: {exc}") from exc

    def _listen(self) -> None:
        while line := self._read():
            try:
                message = orjson.loads(line)
            except orjson.JSONDecodeError:
                log.warning("the launcher sent a line that is not JSON")
                continue
            if "news" in message:
                self._on_news(str(message.get("incarnation", "")), str(message["news"]), str(message.get("detail", "")))
        if not self._closing:
            self._on_lost()

    def _read(self) -> bytes:
        try:
            return self._file.readline()
        except (OSError, ValueError):
            return b""

    def close(self) -> None:
        """Say goodbye; the launcher stops beating."""
        self._closing = True
        try:
            self._socket.sendall(b'{"leave":true}\n')
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("the launcher had gone already")
        self._socket.close()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)
        if self._child is not None:
            self._child.wait(timeout=10)


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(5.0)
    try:
        connection.connect(path)
    except OSError as exc:
        connection.close()
        raise Unavailable(f"the launcher's socket {path} cannot be reached: {exc}") from exc
    return connection


def _start_child() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen([sys.executable, "-m", "worker_agent", "beat"], stdin=theirs.fileno(), stdout=theirs.fileno())
    ours.settimeout(30.0)
    return ours, child
