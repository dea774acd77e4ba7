"""Celery's settings, each with its reason."""

from __future__ import annotations

import os
from functools import cache
from typing import Any, Final

import click

from dtr.config import Settings
from dtr.errors import ConfigError, DtrError
from dtr.publish import VISIBILITY_TIMEOUT_S, broker_settings

__all__ = ["CannotStart", "celery_settings", "drain_s", "settings"]

_DRAIN: Final = 0.6  # of shutdown_grace_s: uploads may finish for this long, then they give their parts back; the rest is for that


@cache
def settings() -> Settings:
    """The settings of this process."""
    return Settings.load()


def drain_s() -> float:
    """How long uploads go on after SIGTERM or SIGQUIT."""
    return settings().shutdown_grace_s * _DRAIN


class CannotStart(click.ClickException):
    """Every ``celery`` command ends with this one line, and with the status that dtr's commands end with."""

    def __init__(self, exc: DtrError) -> None:
        super().__init__(exc.message)
        self.exit_code = exc.exit_code  # type: ignore[misc]  # click reads it from the instance


def celery_settings() -> dict[str, Any]:
    """What the workers, ``inspect`` and Flower go by; raises CannotStart."""
    try:
        reaching = broker_settings(settings().broker)
    except ConfigError as exc:
        raise CannotStart(exc) from exc
    return {
        **reaching,
        # Each of Flower's inspections holds a connection and waits for a second one: with few of them it stands still for good.
        "broker_pool_limit": 100,
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # the default of 100 ends the worker for good
        # The message is a wake-up call and the state machine the truth: redelivery is neither needed nor harmful, except that a task
        # that kills its process before its claim would be redelivered in a tight loop.
        "task_acks_late": True,
        "task_reject_on_worker_lost": False,
        "task_soft_time_limit": VISIBILITY_TIMEOUT_S * 0.45,
        "task_time_limit": VISIBILITY_TIMEOUT_S * 0.48,
        "task_default_queue": "dtr",
        "task_track_started": True,
        "worker_concurrency": settings().upload_processes or max(2, min(4, os.cpu_count() or 2)),
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,  # what waits, waits in the queue, where everybody sees it and any process may take it
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # SIGQUIT and SIGINT: by then uploads have given their parts back.
        "worker_soft_shutdown_timeout": (settings().shutdown_grace_s + drain_s()) / 2,
        "worker_enable_soft_shutdown_on_idle": False,
        "worker_send_task_events": True,  # Flower's pages stay empty without
        "worker_proc_alive_timeout": 60.0,
        "worker_hijack_root_logger": True,
        "worker_redirect_stdouts": False,
    }
