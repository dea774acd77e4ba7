"""A script and a blocking read in one write: the round trip under barriers, forming and restore.

Sending EVALSHA and XREAD BLOCK together halves the latency of arrive-and-wait (facts.md). The connection is ours alone: after any
error it is closed, because the XREAD behind a failed script would still block and its reply would be taken for the next one's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from redis import exceptions as rx

from dtr.state.client import connect_blocking, translate
from dtr.state.scripts import error_of, load

__all__ = ["Entry", "Exchange"]

MAX_BLOCK_MS: Final = 1000  # a waiter looks again at least once a second

Entry = tuple[str, str, dict[str, str]]  # stream, id, fields


class Exchange:
    """One dedicated connection; not for use by two threads at once."""

    __slots__ = ("_connection", "_pid", "_pool", "url")

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self._pool = connect_blocking(url, name=name, block_s=MAX_BLOCK_MS / 1000).connection_pool
        self._connection: Any = None
        self._pid = os.getpid()

    def run_and_wait(
        self, script: str, keys: Sequence[str], args: Sequence[Any], streams: Mapping[str, str], block_ms: int
    ) -> tuple[Any, list[Entry]]:
        """Run ``script``, then wait until one of ``streams`` has an entry after the given id, or ``block_ms`` has passed.

        Returns the script's answer and the entries (none if time ran out). An error of the script is raised at once.
        Never waits longer than a second: call again.

        Raises:
            DtrError: the script's error.
            CoordinatorUnavailable: the connection broke; nobody knows whether the script ran (every script may be sent twice).
        """
        loaded = load(script)
        block = max(1, min(int(block_ms), MAX_BLOCK_MS))
        evalsha = ("EVALSHA", loaded.sha, len(keys), *keys, *args)
        xread = ("XREAD", "BLOCK", block, "STREAMS", *streams.keys(), *streams.values())
        with translate(self.url):
            try:
                answer, reply = self._replies([evalsha, xread])
            except rx.NoScriptError:
                answer, reply = self._replies([("EVAL", loaded.text, *evalsha[2:]), xread])
            except rx.ResponseError as exc:
                known = error_of(exc)
                if known is None:
                    raise
                raise known from exc
        return answer, _entries(reply)

    def wait(self, streams: Mapping[str, str], block_ms: int) -> list[Entry]:
        """Wait as :meth:`run_and_wait` does, without a script before it."""
        block = max(1, min(int(block_ms), MAX_BLOCK_MS))
        with translate(self.url):
            return _entries(self._replies([("XREAD", "BLOCK", block, "STREAMS", *streams.keys(), *streams.values())])[0])

    def _replies(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self._pid != os.getpid():  # the socket belongs to the parent: leave it alone
            self._connection, self._pid = None, os.getpid()
        if self._connection is None:
            self._connection = self._pool.make_connection()
        connection = self._connection
        try:
            connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            return [connection.read_response() for _ in commands]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        connection, self._connection = self._connection, None
        if connection is not None and self._pid == os.getpid():
            connection.disconnect()


def _entries(reply: Any) -> list[Entry]:
    if not reply:
        return []
    return [(stream, entry_id, dict(zip(flat[::2], flat[1::2], strict=True))) for stream, entries in reply for entry_id, flat in entries]
