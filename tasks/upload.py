"""The three tasks. Thin: a message is parsed, the work is in ``dtr.checkpoint.uploading.upload``, and the answer is a word for Flower."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from dtr.checkpoint.uploading.upload import Limits, Uploader
from dtr.errors import DtrError, InvalidInput, Unavailable
from dtr.host import host_id
from dtr.publish import COLLECT, SETTLE, UPLOAD_PART
from tasks import shutdown
from tasks.application import app
from tasks.config import settings
from tasks.messages import Collect, Settle, UploadPart

__all__ = ["collect", "settle", "upload_part"]

log = logging.getLogger(__name__)

Message = TypeVar("Message", bound=Collect)


@app.task(name=UPLOAD_PART, typing=False)  # type: ignore[untyped-decorator]
def upload_part(*args: Any, **given: Any) -> str:
    """Upload one part of this host, unless somebody else does or did."""
    message = _parsed(UploadPart, args, given)
    if message is None:
        return "REJECTED"
    if shutdown.is_over():
        return "STOPPING"
    try:
        word = _uploader(os.getpid()).upload_part(message.job, message.run, message.step, message.rank)
    except DtrError as exc:
        return _later(message, exc)
    log.info("job %s run %s step %d rank %d: %s", message.job, message.run, message.step, message.rank, word)
    return word


@app.task(name=SETTLE, typing=False)  # type: ignore[untyped-decorator]
def settle(*args: Any, **given: Any) -> str:
    """Decide one checkpoint that is complete or cannot become so."""
    message = _parsed(Settle, args, given)
    if message is None:
        return "REJECTED"
    if shutdown.is_over():
        return "STOPPING"
    try:
        word = _uploader(os.getpid()).settle(message.job, message.run, message.step)
    except DtrError as exc:
        return _later(message, exc)
    log.info("job %s run %s step %d: %s", message.job, message.run, message.step, word or "UNKNOWN")
    return word or "UNKNOWN"


@app.task(name=COLLECT, typing=False)  # type: ignore[untyped-decorator]
def collect(*args: Any, **given: Any) -> str:
    """Let go of what no rule of a job's retention keeps, if no other host has just done so."""
    message = _parsed(Collect, args, given)
    if message is None:
        return "REJECTED"
    if shutdown.is_over():
        return "STOPPING"
    try:
        word = _uploader(os.getpid()).collect(message.job)
    except DtrError as exc:
        log.warning("job %s: retention goes on later: %s: %s", message.job, type(exc).__name__, exc)
        return "LATER"
    log.info("job %s: %s", message.job, word)
    return word


def _parsed(kind: type[Message], args: Sequence[Any], given: Mapping[str, Any]) -> Message | None:
    """The message; None, with a line in the log, if it is none: it is neither retried nor an error of ours."""
    try:
        return kind.parse(args, given)
    except InvalidInput as exc:
        log.warning("a message was rejected: %s", exc)
        return None


def _later(message: Settle, exc: DtrError) -> str:
    """Redis or the store is away, or damaged: the reconciler comes back to it, so a failed task with its stack would tell no more."""
    level = logging.WARNING if isinstance(exc, Unavailable) else logging.ERROR
    log.log(level, "job %s run %s step %d: not now: %s: %s", message.job, message.run, message.step, type(exc).__name__, exc)
    return "LATER"


@lru_cache(maxsize=1)
def _uploader(pid: int) -> Uploader:
    """This process's own: connections do not survive a fork."""
    given = settings()
    return Uploader(
        redis_url=given.redis_url,
        staging=given.staging,
        host=host_id(given.staging),
        limits=Limits(
            lease_s=given.lease_s, max_attempts=given.max_attempts, mbps=given.upload_mbps, collect_interval_s=given.collect_interval_s
        ),
        stopping=shutdown.is_over,
    )
