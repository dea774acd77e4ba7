"""What a trainer hands over to whoever beats for it: one line of JSON, checked before anything is done with it.

The trainer's end is :mod:`dtr.launcherlink`; the launcher and the small child of ``beat="process"`` both speak this side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from dtr import names
from dtr.errors import ConfigError, InvalidInput
from dtr.membership import Identity
from dtr.state.client import check_url

__all__ = ["LONGEST_LINE_BYTES", "LEAVE", "OK", "Leave", "Registration", "error_line", "news_line", "parse_line"]

VERSION: Final = 1
LONGEST_LINE_BYTES: Final = 64 << 10
_LONGEST_MS: Final = 7 * 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Who to beat for, where and how often; ``number`` is that of the last beat, ``page`` where its progress is to be read."""

    redis_url: str = field(repr=False)
    job: str
    who: Identity
    ttl_ms: int
    interval_ms: int
    number: int
    page: str

    @property
    def member(self) -> tuple[str, str, str]:
        """The member that this registers; the newest registration of a member counts."""
        return self.redis_url, self.job, self.who.worker_id


@dataclass(frozen=True, slots=True)
class Leave:
    """The trainer has left by itself."""


LEAVE: Final = Leave()
OK: Final = b'{"ok":true}\n'


def news_line(incarnation: str, news: str, detail: str) -> bytes:
    """What the trainer must know about this registration: ``stale``, ``state_lost``, or which ``run`` is open."""
    return orjson.dumps({"news": news, "incarnation": incarnation, "detail": detail}) + b"\n"


def error_line(error: str) -> bytes:
    """The answer to a line that was refused."""
    return orjson.dumps({"ok": False, "error": error}) + b"\n"


def parse_line(line: bytes) -> Registration | Leave:
    """What a trainer said.

    Raises:
        InvalidInput: the line is not what the protocol has; the message names the field.
    """
    try:
        table = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise InvalidInput("a line of the launcher's protocol must be JSON") from None
    if not isinstance(table, dict):
        raise InvalidInput("a line of the launcher's protocol must be a JSON object")
    if table.get("leave") is True:
        return LEAVE
    if table.get("v") != VERSION:
        raise InvalidInput(f"v must be {VERSION}, got {table.get('v')!r}: trainer and launcher are of different versions of dtr", field="v")
    return _registration(table)


def _registration(table: dict[str, Any]) -> Registration:
    try:
        redis_url = check_url(_text(table, "redis_url", 4096))
    except ConfigError as exc:
        raise InvalidInput(exc.message, field="redis_url") from exc
    ttl_ms = _integer(table, "ttl_ms", 1, _LONGEST_MS)
    return Registration(
        redis_url=redis_url,
        job=names.job_name(table.get("job")),
        who=Identity(
            state_id=names.name(table.get("state_id"), "state_id"),
            worker_id=names.name(table.get("worker_id"), "worker_id"),
            incarnation=names.name(table.get("incarnation"), "incarnation"),
            host=_text(table, "host", 255),
            pid=_integer(table, "pid", 1, 1 << 31),
        ),
        ttl_ms=ttl_ms,
        interval_ms=_integer(table, "interval_ms", 1, ttl_ms),
        number=_integer(table, "number", -1, names.MAX_STEP),
        page=_text(table, "page", 4096),
    )


def _text(table: dict[str, Any], key: str, longest: int) -> str:
    value = table.get(key)
    if not isinstance(value, str) or len(value) > longest or "\0" in value:
        raise InvalidInput(f"{key} must be text of up to {longest} characters", field=key)
    return value


def _integer(table: dict[str, Any], key: str, low: int, high: int) -> int:
    value = table.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidInput(f"{key} must be an integer from {low} to {high}, got {str(value)[:40]!r}", field=key)
    return value
