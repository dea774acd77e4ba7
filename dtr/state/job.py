"""One job's state in Redis, as this process reaches it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import redis

from dtr.state.client import connect, mask, translate, translated
from dtr.state.keys import Keys
from dtr.state.scripts import Scripts

__all__ = ["JobState"]


class JobState:
    """Keys, client and scripts of one job. Connects at its first use; a forked child gets connections of its own.

    Args:
        url: of the Redis server.
        job: ``name`` or ``tenant/name``.
        name: what CLIENT LIST shows.
        client: another client to use, for tests on fakeredis.
    """

    __slots__ = ("job", "keys", "redis", "scripts", "url")

    def __init__(self, url: str, job: str, *, name: str = "dtr", client: redis.Redis | None = None) -> None:
        self.url = url
        self.job = job
        self.keys = Keys(job)
        self.redis: Any = client or connect(url, name=f"{name}-{socket.gethostname().split('.')[0]}-{os.getpid()}")
        self.scripts = Scripts(self.redis)

    def __repr__(self) -> str:
        return f"JobState({mask(self.url)!r}, {self.job!r})"

    def call(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run one script; errors are dtr's (CoordinatorUnavailable when Redis cannot be reached)."""
        with translate(self.url):
            return self.scripts.call(script, keys, args)

    def call_all(self, script: str, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> list[Any]:
        """Run one script for several (KEYS, ARGV) in one round trip; each answer, or the DtrError that :meth:`call` would have raised."""
        try:
            answers = self.scripts.call_all(script, calls)
        except (redis.RedisError, OSError, UnicodeError) as exc:
            answers = [exc] * len(calls)
        return [translated(answer, self.url) if isinstance(answer, Exception) else answer for answer in answers]

    def server_now_ms(self) -> int:
        """The server's clock in milliseconds since the epoch."""
        with translate(self.url):
            seconds, microseconds = self.redis.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    def close(self) -> None:
        """Close the connections."""
        self.redis.close()
