"""kombu's Redis transport, made to outlive what is no message.

Whoever can write to the broker can push anything onto a queue; kombu decodes it in the worker's event loop, where an error ends the
worker for good. Here it is dropped with a line in the log.
"""

from __future__ import annotations

import logging
from queue import Empty
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis

__all__ = ["Channel", "Transport", "install"]

log = logging.getLogger(__name__)


class Channel(redis.Channel):
    """A channel whose queues may hold garbage."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # kombu has no types
        except Empty:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as exc:
            log.warning("what lay in the queue was no message, and is dropped: %s: %.200s", type(exc).__name__, exc)
            raise Empty from exc


class Transport(redis.Transport):
    """The transport with that channel."""

    Channel = Channel


def install() -> None:
    """Make this the transport of ``redis://``, ``rediss://`` and ``redis+socket://`` in this process."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = "tasks.transport:Transport"
