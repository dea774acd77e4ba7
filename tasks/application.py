"""The Celery application, as ``celery -A tasks`` finds it; every setting is read when Celery first asks for one."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any

from celery import Celery

from tasks.config import celery_settings

__all__ = ["app"]


class Application(Celery):  # type: ignore[misc]  # Celery has no types
    """Celery with a worker that knows its host's queue."""

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 - Celery's name
        return self.subclass_with_self("tasks.worker:UploadWorker")


def _flower_stays_at_home() -> None:
    """Flower shows and ends tasks without asking who you are: it binds this machine alone unless told otherwise.

    ``celery`` loads Flower's command before the application; its own flags and FLOWER_ADDRESS come later, and win.
    """
    flower = sys.modules.get("flower.options")
    if flower is not None and not flower.options.address:
        flower.options.address = "127.0.0.1"


app = Application("dtr", include=["tasks.upload"], set_as_current=False)
app.config_from_object({})  # no celeryconfig.py that happens to lie in the working folder
app.add_defaults(celery_settings)
app.steps["worker"].add("tasks.reconciler:Reconciling")
_flower_stays_at_home()
