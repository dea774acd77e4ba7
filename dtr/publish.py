"""The one place where dtr puts something on Celery's queues: by task name, since dtr never imports the tasks.

A message names a part, or a checkpoint to settle; it carries no bytes and no pickle. It is a wake-up call: the state machine and the
reconciler guarantee the upload, so a message that is lost, late or doubled costs time at most. Never called in a trainer's own thread:
importing Celery and talking to the broker take their time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import ssl
import threading
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from dtr.errors import CoordinatorUnavailable
from dtr.state.client import check_url, mask
from dtr.state.keys import upload_queue

__all__ = ["COLLECT", "SETTLE", "UPLOAD_PART", "broker_settings", "collect", "settle", "upload_part", "waiting"]

UPLOAD_PART: Final = "dtr.upload_part"
SETTLE: Final = "dtr.settle"
COLLECT: Final = "dtr.collect"

# The same in every process: the shortest one that any process names would redeliver everybody's messages. A message that waits longer
# than this without an answer is delivered again, to find its part claimed or done.
VISIBILITY_TIMEOUT_S: Final = 24 * 3600


def broker_settings(url: str) -> dict[str, Any]:
    """Celery settings that reach the broker at ``url``, every timeout explicit; the same for those who send and those who work.

    Raises:
        ConfigError: no such broker.
    """
    check_url(url, "broker_url")
    parts = urlsplit(url)
    settings: dict[str, Any] = {
        "broker_url": url,
        "broker_transport_options": {
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "socket_timeout": 4,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": 5,  # a worker whose connection is half open notices 15 s after the last message
            "retry_on_timeout": True,
            "priority_steps": [0],  # one list per queue: what `redis-cli LLEN` shows is the queue
        },
        "broker_connection_timeout": 3,
        "broker_pool_limit": 4,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,
        "task_send_sent_event": True,
        "enable_utc": True,
    }
    if parts.scheme == "unix":
        database = parse_qs(parts.query).get("db", ["0"])[0]
        credentials = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        settings["broker_url"] = f"redis+socket://{credentials}{parts.path}?virtual_host={database}"
    elif parts.scheme == "rediss" and "ssl_cert_reqs" not in parts.query:
        settings["broker_use_ssl"] = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    return settings


def upload_part(broker_url: str, *, host: str, job: str, run: str, step: int, rank: int) -> None:
    """Wake an uploader of ``host`` for one part.

    Raises:
        CoordinatorUnavailable: the broker cannot be reached; the reconciler of ``host`` finds the part by itself.
    """
    _send(broker_url, UPLOAD_PART, host, {"job": job, "run": run, "step": step, "rank": rank})


def settle(broker_url: str, *, host: str, job: str, run: str, step: int) -> None:
    """Wake an uploader of ``host`` to decide a checkpoint that is complete or cannot become so; raises CoordinatorUnavailable."""
    _send(broker_url, SETTLE, host, {"job": job, "run": run, "step": step})


def collect(broker_url: str, *, host: str, job: str) -> None:
    """Wake an uploader of ``host`` to let go of what no rule of retention keeps; raises CoordinatorUnavailable."""
    _send(broker_url, COLLECT, host, {"job": job})


def waiting(broker_url: str, host: str) -> int:
    """How many messages lie in the queue of ``host``; raises CoordinatorUnavailable."""
    app = _app(broker_url, os.getpid())
    with _translated(broker_url), app.connection_for_write() as connection:
        channel = connection.channel()
        try:
            return int(channel.queue_declare(queue=upload_queue(host), passive=True).message_count)
        except connection.channel_errors:  # an empty list is no key
            return 0


def _send(broker_url: str, task: str, host: str, arguments: dict[str, Any]) -> None:
    app = _app(broker_url, os.getpid())
    with _translated(broker_url):
        app.send_task(
            task,
            kwargs=arguments,
            queue=upload_queue(host),
            ignore_result=True,
            retry=True,  # once, since a pooled connection may have died of a restart of the broker
            retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0},
        )


_loading = threading.Lock()  # celery's module replaces itself while it loads: a second thread would find half of it


@functools.lru_cache(maxsize=8)
def _app(broker_url: str, pid: int) -> Any:
    """A sender for one broker; keyed by process as well, because a forked child must not use its parent's connections."""
    with _loading:
        from celery import Celery

    app = Celery("dtr-publish", set_as_current=False, changes={}, fixups=[])
    app.conf.update(broker_settings(broker_url))
    return app


@contextlib.contextmanager
def _translated(broker_url: str) -> Iterator[None]:
    from kombu import exceptions
    from redis.exceptions import RedisError

    try:
        yield
    except (exceptions.KombuError, RedisError, OSError) as exc:
        reason = (str(exc) or type(exc).__name__).splitlines()[0]
        raise CoordinatorUnavailable(f"the broker at {mask(broker_url)} cannot be reached: {reason}") from exc
