"""Connections to Redis with every setting explicit, and its errors as dtr's.

A *command client* answers within seconds or fails: short timeouts, three retries. A *blocking connection* waits in XREAD and is
never retried by the library, because the caller decides what a lost wait means.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import redis
from redis import exceptions as rx
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from dtr.errors import ConfigError, CoordinatorRefused, CoordinatorUnavailable, DtrError, StateCorrupt

__all__ = ["check_url", "connect", "connect_blocking", "mask", "translate", "translated"]

COMMAND_TIMEOUT_S: Final = 2.0
_SCHEMES: Final = ("redis", "rediss", "unix")
# What a server says when trying again is no use; everything else that it says may pass.
_REFUSALS: Final = ("NOPERM", "WRONGPASS", "NOAUTH", "OOM", "MISCONF", "DENIED")
# A key of another type than ours, or fields that a script cannot go by: waiting helps neither.
_UNEXPECTED: Final = re.compile(r"WRONGTYPE|^(ERR )?user_script:\d+: ")


def mask(url: str) -> str:
    """The URL without its password, for logs and messages."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    if "@" not in parts.netloc:
        return url
    user = parts.netloc.rpartition("@")[0].partition(":")[0]
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{user}:***@{host}").geturl()


def check_url(url: str, setting: str = "redis_url") -> str:
    """The URL, if Redis can be reached by such a one; raises ConfigError that names what is wrong, with the password masked."""
    shown = mask(url) if isinstance(url, str) else repr(url)

    def wrong(why: str) -> ConfigError:
        return ConfigError(f"{setting}: {why}; expected redis://[user:password@]host:port/db, got {shown}", setting=setting)

    if not isinstance(url, str):
        raise wrong("a URL is text")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ConfigError(
            f"{setting}: not a URL of Redis (port 1 to 65535; a '@', '/' or '#' in a password must be percent-encoded); "
            "expected redis://[user:password@]host:port/db",
            setting=setting,
        ) from exc
    if parts.scheme not in _SCHEMES:
        raise wrong(f"unknown scheme {parts.scheme!r} (known: {', '.join(_SCHEMES)})")
    if parts.netloc.count("@") > 1:
        shown = "***"
        raise wrong("an '@' in a password must be written %40")
    if parts.scheme != "unix":
        if not parts.hostname:
            raise wrong("no host")
        if port == 0:
            raise wrong("port 0")
        if parts.path.strip("/") and not parts.path.strip("/").isdigit():
            raise wrong(f"the database must be a number, got {unquote(parts.path)!r}")
    return url


def connect(url: str, *, name: str, timeout_s: float = COMMAND_TIMEOUT_S, retries: int = 3, max_connections: int = 8) -> redis.Redis:
    """A client for commands; connects at its first use.

    Args:
        url: of the server.
        name: shown by CLIENT LIST, without spaces.
        timeout_s: for connecting and for each reply.
        retries: how often a command is sent again when the connection broke. Scripts are safe to send twice.
        max_connections: of the pool.
    """
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries) if retries else Retry(ExponentialWithJitterBackoff(), 0)
    return redis.Redis.from_url(
        check_url(url),
        client_name=name,
        decode_responses=True,
        protocol=2,
        socket_connect_timeout=timeout_s,
        socket_timeout=timeout_s,
        health_check_interval=10,
        max_connections=max_connections,
        retry=retry,
        retry_on_error=[rx.ConnectionError, rx.TimeoutError, rx.BusyLoadingError, rx.ReadOnlyError],
        **_kept_alive(url),
    )


def connect_blocking(url: str, *, name: str, block_s: float) -> redis.Redis:
    """A client whose replies may take ``block_s`` seconds and that never sends anything twice."""
    return redis.Redis.from_url(
        check_url(url),
        client_name=name,
        decode_responses=True,
        protocol=2,
        socket_connect_timeout=COMMAND_TIMEOUT_S,
        socket_timeout=block_s + 5,
        health_check_interval=0,
        max_connections=4,
        retry=Retry(ExponentialWithJitterBackoff(), 0),
        retry_on_error=[],
        **_kept_alive(url),
    )


def _kept_alive(url: str) -> dict[str, bool]:
    """Keepalive is TCP's: the connection of a Unix socket knows no such option."""
    return {} if url.startswith("unix:") else {"socket_keepalive": True}


@contextlib.contextmanager
def translate(url: str) -> Iterator[None]:
    """Errors of redis-py become errors of dtr, which say what to do."""
    try:
        yield
    except Exception as exc:
        known = translated(exc, url)
        if known is exc:
            raise
        raise known from exc


def translated(exc: Exception, url: str) -> Exception:
    """What ``exc`` means to a user of dtr; itself if it is dtr's already, or none of Redis's."""
    if isinstance(exc, DtrError):  # also where it is an OSError or a ValueError too
        return exc
    shown = mask(url)
    if isinstance(exc, (rx.AuthenticationError, rx.NoPermissionError, rx.OutOfMemoryError)) or (
        isinstance(exc, rx.ResponseError) and str(exc).startswith(_REFUSALS)
    ):
        return CoordinatorRefused(f"Redis at {shown} refuses: {exc}")
    if isinstance(exc, rx.ResponseError) and _UNEXPECTED.search(str(exc)):
        return StateCorrupt(f"Redis at {shown} holds something else than this version of dtr writes: {exc}")
    if isinstance(exc, rx.ResponseError):
        return CoordinatorUnavailable(f"Redis at {shown} answered with an error: {exc}")
    if isinstance(exc, (rx.RedisError, OSError, UnicodeError)):
        hint = "Start one with `dtr up`, or check the URL"
        if url.startswith("rediss:") and (isinstance(exc, rx.TimeoutError) or "SSL" in str(exc)):
            hint = "If it speaks no TLS, its URL begins with redis://"
        return CoordinatorUnavailable(f"Redis at {shown} cannot be reached: {_first_line(exc)}. {hint}.")
    return exc


def _first_line(exc: BaseException) -> Any:
    return (str(exc) or type(exc).__name__).splitlines()[0].rstrip(".")
