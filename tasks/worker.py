"""What makes a Celery worker the uploader of its host, without flags."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from types import FrameType
from typing import Any, Final

from billiard import active_children
from celery import signals
from celery.apps.worker import Worker
from kombu.entity import Queue

from dtr.errors import ConfigError, CoordinatorRefused, CoordinatorUnavailable
from dtr.host import host_id
from dtr.state.client import connect, translate
from dtr.state.keys import upload_queue
from dtr.state.scripts import preload
from tasks import shutdown, transport
from tasks.config import CannotStart, drain_s, settings
from tasks.priority import give_way

__all__ = ["UploadWorker"]

_PR_SET_PDEATHSIG: Final = 1


class UploadWorker(Worker):  # type: ignore[misc]  # Celery has no types
    """A worker of this host's queue. It does not gossip: in a fleet that is traffic by the square of the hosts, and of no use here."""

    def on_before_init(self, **options: Any) -> None:
        _refuse_early()
        queue = upload_queue(host_id(settings().staging))
        self.app.conf.task_queues = [Queue(queue, routing_key=queue)]  # type: ignore[no-untyped-call]
        self.app.conf.task_default_queue = queue
        shutdown.share()
        transport.install()
        preload()  # before the pool forks: its processes and this one go by the same scripts
        super().on_before_init(**options)

    def setup_instance(self, **options: Any) -> None:
        super().setup_instance(**{**options, "without_gossip": True, "without_mingle": True})

    def install_platform_tweaks(self, worker: Any) -> None:
        """Celery's handlers, and before each of them: uploads learn at once that their time is bounded."""
        super().install_platform_tweaks(worker)
        for how in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            _drain_before(how, signal.getsignal(how))


@signals.after_setup_logger.connect  # type: ignore[untyped-decorator]
def _say_what_is_done(loglevel: int = logging.WARNING, **_: Any) -> None:
    """Our own few lines are worth reading at Celery's default level too; a level that somebody chose is kept."""
    if loglevel == logging.WARNING:
        for name in ("dtr", "tasks"):
            logging.getLogger(name).setLevel(logging.INFO)


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def _pool_process(**_: Any) -> None:
    """It gives way to trainers. One whose worker was killed would wait for ever: the kernel kills it as well."""
    give_way(settings().upload_nice)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if shutdown.is_orphan():  # killed before the kernel was asked
        os._exit(1)


def _refuse_early() -> None:
    """End with one line where waiting would not help: no staging folder, or a Redis that refuses us. One that is away may come."""
    given = settings()
    client = connect(given.redis_url, name="dtr-uploader", retries=0)
    try:
        host_id(given.staging)
        with translate(given.redis_url):
            client.ping()
    except ConfigError as exc:
        raise CannotStart(exc) from exc
    except CoordinatorRefused as exc:
        raise CannotStart(exc) from exc
    except CoordinatorUnavailable as exc:
        print(f"{exc} The uploader waits for it.", file=sys.stderr)
    finally:
        client.close()


def _drain_before(how: signal.Signals, handler: Any) -> None:
    if not callable(handler):
        return

    def drain(number: int, frame: FrameType | None) -> None:
        if os.getpid() == shutdown.owner_pid():
            shutdown.begin(drain_s())
            shutdown.watch(_pool_processes, kill_s=settings().shutdown_grace_s)
        handler(number, frame)

    signal.signal(how, drain)


def _pool_processes() -> list[int]:
    return [child.pid for child in active_children() if child.pid]
