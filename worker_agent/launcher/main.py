"""One launch from its beginning to its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dtr.checkpoint.reclaim import reclaim
from dtr.config import Settings
from dtr.stack import default_home
from dtr.views.settings import origins
from worker_agent.launcher.claim import claimed
from worker_agent.launcher.ground import finish_uploads, standing
from worker_agent.launcher.launch import Launch, find_command, seats
from worker_agent.launcher.loop import run_trainers

__all__ = ["Given", "launch"]

log = logging.getLogger(__name__)

_UPLOADS_WITHIN_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the user chose for this launch beside the command; None: not given."""

    redis_url: str | None = None
    job: str | None = None
    staging: str | None = None
    uploader: bool = True


def launch(what: Launch, given: Given, environ: Mapping[str, str]) -> int:
    """Run trainers to their end; the exit status.

    Args:
        what: is to be started.
        given: server, job and staging folder.
        environ: of the launcher: where settings come from that were not given, and what trainers inherit.

    Raises:
        CommandNotFound: before anything was started.
        ConfigError, Unavailable: what the launch stands on is wrong or missing; no trainer was started.
    """
    settings = Settings.load(environ=environ, redis_url=given.redis_url, job=given.job, staging=given.staging)
    find_command(what.command, environ)
    _, named_by = origins(environ=environ, redis_url=given.redis_url)["redis_url"]
    with standing(settings, default_home(environ), named_by=named_by, uploader=given.uploader) as ground:
        with claimed(settings.staging, settings.job) as claim:
            if claim.index and what.nnodes == 1:
                log.warning("another launcher runs for job %s on this host; if their trainers belong together, use --nnodes", settings.job)
            places = seats(what, host=claim.host, index=claim.index, folder=claim.folder)
            status = run_trainers(what, places, settings=settings, job=given.job, environ=environ)
        if ground.uploads:
            finish_uploads(settings.staging, within_s=_UPLOADS_WITHIN_S)
            reclaim(settings.staging)  # the memory of trainers that have ended: the uploader may end before it does that
    return status
