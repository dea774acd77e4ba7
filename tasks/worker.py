"""What makes a Celery worker the uploader of its host, without flags."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from typing import Any, Final

from billiard import active_children
from celery import signals
from celery.apps.worker import Worker
from kombu.entity import Queue

from dtr.host import host_id
from dtr.state.keys import upload_queue
from tasks import shutdown, transport
from tasks.config import settings

__all__ = ["UploadWorker"]

_PR_SET_PDEATHSIG: Final = 1


class UploadWorker(Worker):  # type: ignore[misc]  # Celery has no types
    """A worker of this host's queue. It does not gossip: in a fleet that is traffic by the square of the hosts, and of no use here."""

    def on_before_init(self, **options: Any) -> None:
        queue = upload_queue(host_id(settings().staging))
        self.app.conf.task_queues = [Queue(queue, routing_key=queue)]  # type: ignore[no-untyped-call]
        self.app.conf.task_default_queue = queue
        shutdown.share()
        transport.install()
        super().on_before_init(**options)

    def setup_instance(self, **options: Any) -> None:
        super().setup_instance(**{**options, "without_gossip": True, "without_mingle": True})


@signals.after_setup_logger.connect  # type: ignore[untyped-decorator]
def _say_what_is_done(loglevel: int = logging.WARNING, **_: Any) -> None:
    """Our own few lines are worth reading at Celery's default level too; a level that somebody chose is kept."""
    if loglevel == logging.WARNING:
        for name in ("dtr", "tasks"):
            logging.getLogger(name).setLevel(logging.INFO)


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def _end_with_the_worker(**_: Any) -> None:
    """A pool process whose worker was killed would wait for ever: the kernel kills it as well."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if shutdown.is_orphan():  # killed before the kernel was asked
        os._exit(1)


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _drain(**_: Any) -> None:
    """SIGTERM, SIGINT or SIGQUIT: in the signal handler, so nothing here may wait."""
    shutdown.begin()
    shutdown.watch(_pool_processes)


def _pool_processes() -> list[int]:
    return [child.pid for child in active_children() if child.pid]
