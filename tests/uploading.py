"""An uploader of one host without Celery: the real reconciler and the real upload, in a thread. What wakes it is its own look."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from dtr.checkpoint.uploading.reconcile import Reconciler
from dtr.checkpoint.uploading.upload import Limits, Uploader
from dtr.config import Settings
from dtr.errors import DtrError, Unavailable
from dtr.host import host_id
from dtr.state.client import connect
from dtr.state.keys import uploader


class Uploads:
    """Looks every 20 ms until stopped, and does what each look asks for."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.host = settings, host_id(settings.staging)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="test-uploads", daemon=True)
        self.failures: list[BaseException] = []

    def _loop(self) -> None:
        given = self.settings
        reconciler = Reconciler(redis_url=given.redis_url, staging=given.staging, host=self.host)
        work = Uploader(redis_url=given.redis_url, staging=given.staging, host=self.host, limits=Limits(lease_s=given.lease_s))
        presence = connect(given.redis_url, name="test-uploads")
        while not self._stop.wait(0.02):
            try:
                presence.hset(uploader(self.host), "pid", 1)
                presence.expire(uploader(self.host), 5)
                for wake in reconciler.look().wakes:
                    if wake.rank is None:
                        work.settle(wake.job, wake.run, wake.step)
                    else:
                        work.upload_part(wake.job, wake.run, wake.step, wake.rank)
            except Unavailable:
                continue  # the test has taken Redis or the store away
            except DtrError as exc:
                self.failures.append(exc)
            except Exception as exc:
                if "onnection" not in str(exc):
                    self.failures.append(exc)
        with contextlib.suppress(Exception):
            presence.delete(uploader(self.host))
        presence.close()
        work.close()
        reconciler.close()

    def start(self) -> Uploads:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=30)


@contextlib.contextmanager
def uploading(settings: Settings) -> Iterator[Uploads]:
    """An uploader for the host of ``settings`` while the block runs."""
    running = Uploads(settings).start()
    try:
        yield running
    finally:
        running.stop()
