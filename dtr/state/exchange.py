"""A script and a blocking read in one write: the round trip under barriers, forming and restore.

Sending EVALSHA and XREAD BLOCK together halves the latency of arrive-and-wait (facts.md). The connection is ours alone: after any
error it is closed, because the XREAD behind a failed script would still block and its reply would be taken for the next one's.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Final

from hiredis import Reader, ReplyError, pack_command
from redis import exceptions as rx

from dtr.state.client import connect_blocking, translate, translated
from dtr.state.scripts import error_of, load

__all__ = ["Entry", "Exchange"]

MAX_BLOCK_MS: Final = 1000  # a waiter looks again at least once a second

Entry = tuple[str, str, dict[str, str]]  # stream, id, fields


class Exchange:
    """One dedicated connection; not for use by two threads at once."""

    __slots__ = ("_connection", "_lowest", "_pid", "_pool", "_reader", "_socket", "url")

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self._pool = connect_blocking(url, name=name, block_s=MAX_BLOCK_MS / 1000).connection_pool
        self._connection: Any = None
        self._socket: Any = None
        self._reader: Any = None
        self._lowest = 1
        self._pid = os.getpid()

    def run_and_wait(
        self, script: str, keys: Sequence[str], args: Sequence[Any], streams: Mapping[str, str], block_ms: int, *, quiet_bytes: int = 0
    ) -> tuple[Any, list[Entry]]:
        """Run ``script``, then wait until one of ``streams`` has an entry after the given id, or ``block_ms`` has passed.

        Args:
            script, keys, args: what to run.
            streams: stream -> the last id seen, never ``$``.
            block_ms: how long to wait, at most a second.
            quiet_bytes: an answer of the script of at most so many bytes on the wire does not wake this process by itself: it is read
                together with what the wait brings. A longer one, every error among them, does.

        Returns the script's answer and the entries (none if time ran out). An error of the script is raised at once.
        Never waits longer than a second: call again.

        Raises:
            DtrError: the script's error.
            CoordinatorUnavailable: the connection broke; nobody knows whether the script ran (every script may be sent twice).
        """
        loaded = load(script)
        xread = ("XREAD", "BLOCK", _block(block_ms), "STREAMS", *streams.keys(), *streams.values())
        try:
            try:
                answer, reply = self._replies([("EVALSHA", loaded.sha, len(keys), *keys, *args), xread], quiet_bytes)
            except rx.NoScriptError:
                answer, reply = self._replies([("EVAL", loaded.text, len(keys), *keys, *args), xread], quiet_bytes)
        except rx.ResponseError as exc:
            known = error_of(exc)
            if known is not None:
                raise known from None
            raise translated(exc, self.url) from exc
        except (rx.RedisError, OSError, UnicodeError) as exc:
            raise translated(exc, self.url) from exc
        return answer, _entries(reply)

    def wait(self, streams: Mapping[str, str], block_ms: int) -> list[Entry]:
        """Wait as :meth:`run_and_wait` does, without a script before it."""
        with translate(self.url):
            return _entries(self._replies([("XREAD", "BLOCK", _block(block_ms), "STREAMS", *streams.keys(), *streams.values())])[0])

    def _replies(self, commands: Sequence[tuple[Any, ...]], quiet_bytes: int = 0) -> list[Any]:
        # redis-py connects (address, TLS, password, name); from then on bytes go past it, since its ordinary path costs a waiter more
        # time than the server does: in a hundred processes that wake at once, every line of Python is read from cold memory.
        if self._pid != os.getpid():  # the socket belongs to the parent: leave it alone
            self._connection, self._pid = None, os.getpid()
        if self._connection is None:
            self._connect()
        read, receive = self._reader.gets, self._socket.recv
        try:
            self._wake_from(quiet_bytes + 1)
            self._socket.sendall(b"".join(map(pack_command, commands)))
            replies: list[Any] = []
            while len(replies) < len(commands):
                while (reply := read()) is False:
                    if replies and self._lowest > 1:
                        self._wake_from(1)  # the rest of the answer may be shorter than that
                    chunk = receive(65_536)
                    if not chunk:
                        raise rx.ConnectionError("the server closed the connection")
                    self._reader.feed(chunk)
                if isinstance(reply, ReplyError):
                    raise _response_error(reply)
                replies.append(reply)
            return replies
        except BaseException:
            self.close()
            raise

    def _wake_from(self, size_bytes: int) -> None:
        """Let the kernel wake this process only when so many bytes have come; without it over TLS, where bytes are not the answer's."""
        if self._lowest != size_bytes and not isinstance(self._socket, ssl.SSLSocket):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)
            self._lowest = size_bytes

    def _connect(self) -> None:
        connection = self._pool.connection_class(**self._pool.connection_kwargs)  # make_connection() counts, and never down
        connection.connect()
        self._connection, self._socket = connection, connection._sock  # noqa: SLF001 - redis-py has no public name for it
        self._reader = Reader(encoding="utf-8", errors="surrogateescape", notEnoughData=False)
        self._lowest = 1

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        connection, self._connection = self._connection, None
        if connection is not None and self._pid == os.getpid():
            connection.disconnect()


def _response_error(reply: Exception) -> rx.RedisError:
    text = str(reply)
    code, _, detail = text.partition(" ")
    kind = {"NOSCRIPT": rx.NoScriptError, "NOPERM": rx.NoPermissionError, "OOM": rx.OutOfMemoryError, "LOADING": rx.BusyLoadingError}
    return kind[code](detail) if code in kind else rx.ResponseError(text)


def _block(block_ms: float) -> int:
    """XREAD's BLOCK: at least 1, since 0 would wait for ever."""
    return max(1, min(int(block_ms), MAX_BLOCK_MS))


def _entries(reply: Any) -> list[Entry]:
    if not reply:
        return []
    return [(stream, entry_id, dict(zip(flat[::2], flat[1::2], strict=True))) for stream, entries in reply for entry_id, flat in entries]
