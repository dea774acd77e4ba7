"""The coordinator itself: does it answer, how fast, and is it set up so that it forgets nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dtr.errors import CoordinatorRefused
from dtr.stack.server import OLDEST, shortcomings
from dtr.state.client import mask
from dtr.state.job import JobState
from dtr.views.reading import reading

__all__ = ["ServerView", "describe", "read"]

_NEARLY_FULL: Final = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """A Redis or Valkey server; ``url`` is masked, and what INFO did not tell is None."""

    url: str
    engine: str
    version: str | None
    role: str | None
    ping_ms: float
    uptime_s: int | None
    clients: int | None
    used_memory_bytes: int | None
    maxmemory_bytes: int | None  # 0: no limit
    append_only: bool | None
    warnings: tuple[str, ...]


def read(state: JobState) -> ServerView:
    """Ask the server.

    Raises:
        CoordinatorUnavailable, CoordinatorRefused: it does not answer, or not to this user. A user who may not run INFO is no error.
    """
    with reading(state):
        state.redis.ping()  # connects, so that the next one measures the round trip alone
        began = time.monotonic()
        state.redis.ping()
        ping_ms = (time.monotonic() - began) * 1000
    try:
        with reading(state):
            info: Mapping[str, Any] = state.redis.info()
    except CoordinatorRefused as exc:
        return describe({}, url=state.url, ping_ms=ping_ms, refused=str(exc.__cause__))
    return describe(info, url=state.url, ping_ms=ping_ms)


def describe(info: Mapping[str, Any], *, url: str, ping_ms: float, refused: str | None = None) -> ServerView:
    """What the answer of INFO says; ``refused`` is the reason why there is none."""
    engine = "valkey" if "valkey_version" in info else "redis"
    version = info.get(f"{engine}_version")
    return ServerView(
        url=mask(url),
        engine=engine,
        version=None if version is None else str(version),
        role=info.get("role"),
        ping_ms=round(ping_ms, 3),
        uptime_s=info.get("uptime_in_seconds"),
        clients=info.get("connected_clients"),
        used_memory_bytes=info.get("used_memory"),
        maxmemory_bytes=info.get("maxmemory"),
        append_only=bool(info["aof_enabled"]) if "aof_enabled" in info else None,
        warnings=tuple(_warnings(info)) if refused is None else (f"its state is unknown, this user may not run INFO: {refused}",),
    )


def _warnings(info: Mapping[str, Any]) -> list[str]:
    """What is unsafe or wrong about the server, one sentence each."""
    found = shortcomings(dict(info))
    version = tuple(int(number) for number in re.findall(r"\d+", str(info.get("redis_version", "")))[:2])
    if version and version < OLDEST:
        found.append(f"it is version {info['redis_version']}; dtr needs 7.0 or later")
    if info.get("loading"):
        found.append("it is still loading its data")
    if info.get("role") == "slave":
        link = "" if info.get("master_link_status") == "up" else ", and it has lost its primary"
        found.append(
            f"it is a replica of {info.get('master_host')}:{info.get('master_port')}{link}: writes fail here; use the primary's URL"
        )
    found += [f"{word} failed: look at its log and at the disk" for field, word in _WRITES.items() if info.get(field, "ok") != "ok"]
    used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if limit and used > _NEARLY_FULL * limit:
        found.append(f"its memory is {100 * used // limit} % full: at 100 % it refuses every write; raise maxmemory")
    return found


_WRITES: Final = {
    "aof_last_write_status": "its last write to the append-only file",
    "aof_last_bgrewrite_status": "its last rewrite of the append-only file",
    "rdb_last_bgsave_status": "its last snapshot",
}
