"""A script and a blocking read in one write: the round trip under barriers, forming and restore.

Sending EVALSHA and XREAD BLOCK together halves the latency of arrive-and-wait (facts.md). The connection is ours alone: after any
error it is closed, because the XREAD behind a failed script would still block and its reply would be taken for the next one's.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from hiredis import Reader, ReplyError, pack_command
from redis import exceptions as rx

from dtr.state.client import connect_blocking, translate, translated
from dtr.state.scripts import error_of, load

__all__ = ["Entry", "Exchange"]

MAX_BLOCK_MS: Final = 1000  # a waiter looks again at least once a second

# ``:0\r\n`` has 4 bytes, and XREAD's shortest reply, ``*-1\r\n``, has 5. The kernel counts the bytes that came after what a sleeping
# receive has taken already, so a higher mark than this one would let it sleep through the reply behind a first one that came early.
_NEWS_BYTES: Final = 5

Entry = tuple[str, str, dict[str, str]]  # stream, id, fields


class Exchange:
    """One dedicated connection; not for use by two threads at once."""

    __slots__ = ("_connection", "_feed", "_gets", "_lowest", "_pid", "_pool", "_receive", "_socket", "url")

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self._pool = connect_blocking(url, name=name, block_s=MAX_BLOCK_MS / 1000).connection_pool
        self._connection: Any = None
        self._socket: Any = None
        self._gets: Any = None
        self._feed: Any = None
        self._receive: Any = None
        self._lowest = 1
        self._pid = os.getpid()

    def run_and_wait(
        self, script: str, keys: Sequence[str], args: Sequence[Any], streams: Mapping[str, str], block_ms: int
    ) -> tuple[Any, list[Entry]]:
        """Run ``script``, then wait until one of ``streams`` has an entry after the given id, or ``block_ms`` has passed.

        Args:
            script, keys, args: what to run.
            streams: stream -> the last id seen, never ``$``.
            block_ms: how long to wait, at most a second.

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
                answer, reply = self._replies([("EVALSHA", loaded.sha, len(keys), *keys, *args), xread])
            except rx.NoScriptError:
                answer, reply = self._replies([("EVAL", loaded.text, len(keys), *keys, *args), xread])
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

    def _replies(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        # redis-py connects (address, TLS, password, name); from then on bytes go past it, since its ordinary path costs a waiter more
        # time than the server does: in a hundred processes that wake at once, every line of Python is read from cold memory.
        self._reopen()
        try:
            self._wake_from(1)
            self._socket.sendall(b"".join(map(pack_command, commands)))
            replies: list[Any] = []
            for _ in commands:
                reply = self._next()
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

    def ask(self, payload: bytes) -> tuple[Any, Any]:
        """Send two packed commands in one write and return both raw replies: the path of every barrier, with nothing to spare on it.

        A first reply that is an integer of one digit does not wake this process by itself: it is read with what comes after it.

        Raises:
            NoScriptError: nothing was done; send the script's text.
            DtrError: the script's error.
            CoordinatorUnavailable: the connection broke; nobody knows whether the script ran.
        """
        try:
            if self._connection is None or self._pid != os.getpid():
                self._reopen()
            if self._lowest != _NEWS_BYTES:
                self._wake_from(_NEWS_BYTES)
            self._socket.sendall(payload)
            first = self._next()
            if isinstance(first, ReplyError):
                raise _response_error(first)
            second = self._gets()
            if second is False:
                self._wake_from(1)  # the rest of the answer may be shorter than that
                second = self._next()
            return first, second
        except rx.NoScriptError:
            self.close()
            raise
        except rx.ResponseError as exc:
            self.close()
            known = error_of(exc)
            if known is not None:
                raise known from None
            raise translated(exc, self.url) from exc
        except (rx.RedisError, OSError, UnicodeError) as exc:
            self.close()
            raise translated(exc, self.url) from exc
        except BaseException:
            self.close()
            raise

    def _next(self) -> Any:
        while (reply := self._gets()) is False:
            chunk = self._receive(65_536)
            if not chunk:
                raise rx.ConnectionError("the server closed the connection")
            self._feed(chunk)
        return reply

    def _reopen(self) -> None:
        if self._pid != os.getpid():  # the socket belongs to the parent: leave it alone
            self._connection, self._pid = None, os.getpid()
        if self._connection is None:
            self._connect()

    def _connect(self) -> None:
        connection = self._pool.connection_class(**self._pool.connection_kwargs)  # make_connection() counts, and never down
        connection.connect()
        self._connection, self._socket = connection, connection._sock  # noqa: SLF001 - redis-py has no public name for it
        reader = Reader(encoding="utf-8", errors="surrogateescape", notEnoughData=False)
        self._gets, self._feed = reader.gets, reader.feed
        self._receive = self._socket.recv
        self._lowest = 1
        timeout_s = self._socket.gettimeout()
        if timeout_s is not None and not isinstance(self._socket, ssl.SSLSocket):
            # The kernel keeps the time: Python's own timeout costs a poll before each send and each receive.
            self._socket.settimeout(None)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(timeout_s), 0))

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
