"""kombu's Redis transport, made to outlive what is no message, and a broker that is away for a moment.

Whoever can write to the broker can push anything onto a queue; kombu decodes it in the worker's event loop, where an error ends the
worker for good. Here it is dropped with a line in the log. And a channel that is closed, or acknowledges a task, after its connection was
let go of has nothing to connect by; that too ended the worker, since kombu forgives errors of connections and no AttributeError. Last,
after a quick restart of Redis the event loop may hear of a connection that was replaced meanwhile, and kombu then waited on the new one
for a broadcast that nobody sent, for good; as an error, it makes Celery begin anew with all connections.
"""

from __future__ import annotations

import logging
from queue import Empty
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis

__all__ = ["Channel", "Transport", "install"]

log = logging.getLogger(__name__)


class Channel(redis.Channel):
    """A channel whose queues may hold garbage, and whose connection may be gone."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # kombu has no types
        except Empty:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as exc:
            log.warning("what lay in the queue was no message, and is dropped: %s: %.200s", type(exc).__name__, exc)
            raise Empty from exc

    def _connparams(self, asynchronous: bool = False) -> Any:
        if self.connection.client is None:
            raise ConnectionError("the connection to the broker was let go of")
        return super()._connparams(asynchronous=asynchronous)  # type: ignore[no-untyped-call]

    def _receive_one(self, c: Any) -> Any:
        try:
            if not c.connection.can_read(timeout=0):
                raise ConnectionError("what was heard from is no connection that is listened to any more")
        except self.connection_errors:
            self._in_listen = None  # type: ignore[assignment]  # kombu sets either
            raise
        return super()._receive_one(c)  # type: ignore[no-untyped-call]


class Transport(redis.Transport):
    """The transport with that channel."""

    Channel = Channel


def install() -> None:
    """Make this the transport of ``redis://``, ``rediss://`` and ``redis+socket://`` in this process."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = "tasks.transport:Transport"
