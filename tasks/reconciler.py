"""The reconciler as a part of every worker: a thread of the main process that looks, says so in Redis, and wakes the pool.

It begins before the worker has reached its broker and outlives every outage of it, and of Redis. A reason is logged when it changes.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from importlib import metadata
from typing import Any, ClassVar, Final

from celery import bootsteps
from celery.worker import state
from redis.exceptions import RedisError

from dtr import publish
from dtr.checkpoint.uploading.reconcile import Look, Reconciler, Wake
from dtr.config import Settings
from dtr.errors import Unavailable
from dtr.host import host_id, keep_host_id
from dtr.state.client import connect
from dtr.state.keys import upload_queue, uploader
from tasks.config import settings

__all__ = ["Presence", "ReconcilerThread", "Reconciling", "stuck_s"]

log = logging.getLogger(__name__)

_PRESENT_FOR_S: Final = 15.0
_STUCK_AFTER_S: Final = 30.0


class Presence:
    """``dtr:uploader:HOST``: someone uploads for this host, and how that goes. The key ends with its worker, or soon after its death."""

    def __init__(self, given: Settings, host: str) -> None:
        self._redis = connect(given.redis_url, name="dtr-uploader", max_connections=2)
        self._key, self._host = uploader(host), host
        self._ttl_ms = int(max(_PRESENT_FOR_S, 5 * given.scan_interval_s) * 1000)
        self._started_at, self._version = int(time.time() * 1000), _version()

    def show(self, look: Look, uploads: int) -> None:
        """Renew the key. Raises RedisError."""
        fields: dict[Any, Any] = {
            "host": self._host,
            "pid": os.getpid(),
            "started_at": self._started_at,
            "last_scan_at": int(time.time() * 1000),
            "queue": upload_queue(self._host),
            "version": self._version,
            "slots": look.slots,
            "staged": look.staged,
            "staged_bytes": look.staged_bytes,
            "open_checkpoints": look.open_checkpoints,
            "uploads": uploads,
            "stuck_s": int(stuck_s(look, uploads)),
        }
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hset(self._key, mapping=fields)
        pipeline.pexpire(self._key, self._ttl_ms)
        pipeline.execute()

    def end(self) -> None:
        """Remove the key, if it is still ours, and close the connection."""
        try:
            if self._redis.hget(self._key, "pid") == str(os.getpid()):
                self._redis.delete(self._key)
        except RedisError as exc:
            log.info("the uploader's presence ends by itself: %s", exc)
        self._redis.close()


def stuck_s(look: Look, uploads: int) -> float:
    """How long a part has waited though no upload is under way that it could wait for; 0.0 where that is no matter."""
    return look.unclaimed_s if look.unclaimed_s > _STUCK_AFTER_S and not uploads else 0.0


class ReconcilerThread(threading.Thread):
    """Looks every ``scan_interval_s``, sooner after the queue was worked off, later while Redis is away; ends at ``stop()``."""

    def __init__(self, given: Settings, host: str) -> None:
        super().__init__(name="dtr-reconciler", daemon=True)
        self._given, self._host = given, host
        # Made here, in the main thread: what this thread imports could be half imported in a pool process that forks meanwhile.
        self._reconciler = Reconciler(
            redis_url=given.redis_url, staging=given.staging, host=host, collect_interval_s=given.collect_interval_s
        )
        self._presence = Presence(given, host)
        self._over = threading.Event()
        self._trouble, self._last = "", Look()

    def stop(self) -> None:
        """End the thread within a look; waits for that, a few seconds at most."""
        self._over.set()
        self.join(timeout=5.0)

    def run(self) -> None:
        while True:
            self._once(self._reconciler, self._presence)
            if self._over.wait(self._given.scan_interval_s * random.uniform(0.8, 1.2)):
                break
        self._presence.end()
        self._reconciler.close()

    def _once(self, reconciler: Reconciler, presence: Presence) -> None:
        try:
            self._keep_host_id()
            presence.show(self._last, _running())  # first: a look may take its time
            self._last = reconciler.look()
            presence.show(self._last, _running())
            self._wake(self._last.wakes)
            for job in self._last.collects:
                publish.collect(self._given.broker, host=self._host, job=job)
        except (Unavailable, RedisError) as exc:
            self._say(f"{type(exc).__name__}: {exc}")
        except Exception:  # the loop outlives whatever one look meets
            log.exception("the reconciler's look failed; it goes on")
        else:
            stuck = stuck_s(self._last, _running()) > 0
            self._say(
                "no process of this worker takes up the parts that wait; see what it logged before, or start it anew" if stuck else ""
            )

    def _keep_host_id(self) -> None:
        """Somebody emptied the staging folder: put our id back, so that the next trainer does not become another host.

        A trainer that was quicker has given the folder a new id, whose queue nobody consumes: end, to be started anew for that.
        """
        path = f"{self._given.staging}/.host-id"
        if not os.path.exists(path):
            log.warning("%s is gone: the id %s is put back", path, self._host)
            keep_host_id(self._given.staging, self._host)
        now = host_id(self._given.staging)
        if now != self._host and not self._over.is_set():
            log.critical("the staging folder belongs to host %s by now, not to %s: this uploader ends; start it again", now, self._host)
            self._over.set()
            os.kill(os.getpid(), signal.SIGTERM)

    def _wake(self, wakes: list[Wake]) -> None:
        """Send what is not in the queue already: as many messages as parts that wait, however long they wait."""
        room = len(wakes) - publish.waiting(self._given.broker, self._host) if wakes else 0
        for wake in random.sample(wakes, room) if 0 < room < len(wakes) else wakes[: max(room, 0)]:
            broker, host = self._given.broker, self._host
            if wake.rank is None:
                publish.settle(broker, host=host, job=wake.job, run=wake.run, step=wake.step)
            else:
                publish.upload_part(broker, host=host, job=wake.job, run=wake.run, step=wake.step, rank=wake.rank)

    def _say(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            log.warning("the reconciler waits: %s", trouble)
        elif self._trouble and not trouble:
            log.info("the reconciler goes on")
        self._trouble = trouble


class Reconciling(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """The bootstep: the thread starts once the pool has forked, and ends before the pool is drained."""

    requires: ClassVar = {"celery.worker.components:Pool"}

    def __init__(self, worker: Any, **options: Any) -> None:
        self._thread: ReconcilerThread | None = None
        super().__init__(worker, **options)

    def start(self, worker: Any) -> None:
        given = settings()
        host = host_id(given.staging)
        log.info("uploader of host %s: queue %s, staging %s", host, upload_queue(host), given.staging)
        self._thread = ReconcilerThread(given, host)
        self._thread.start()

    def stop(self, worker: Any) -> None:
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    terminate = stop


def _running() -> int:
    return len(state.active_requests)


def _version() -> str:
    try:
        return metadata.version("dtr")
    except metadata.PackageNotFoundError:
        return "unknown"
