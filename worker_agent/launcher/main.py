"""One launch from its beginning to its end."""

from __future__ import annotations

import logging
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dtr.checkpoint.staging.reclaim import reclaim
from dtr.config import Settings, default_home
from dtr.store import open_store
from worker_agent.launcher.claim import claimed
from worker_agent.launcher.ground import finish_uploads, standing
from worker_agent.launcher.loop import run_trainers
from worker_agent.launcher.plan import Launch, check_descriptors, find_command, seats

__all__ = ["Given", "launch"]

log = logging.getLogger(__name__)

_UPLOADS_WITHIN_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the user chose for this launch beside the command; None: not given."""

    redis_url: str | None = None
    job: str | None = None
    staging: str | None = None
    store: str | None = None
    uploader: bool = True


def launch(what: Launch, given: Given, environ: Mapping[str, str]) -> int:
    """Run trainers to their end; the exit status.

    Args:
        what: is to be started.
        given: server, job, staging folder and store.
        environ: of the launcher: where settings come from that were not given, and what trainers inherit.

    Raises:
        CommandNotFound: before anything was started.
        ConfigError, Unavailable: what the launch stands on is wrong or missing; no trainer was started.
    """
    if given.store is not None:
        open_store(given.store)  # what is wrong with it is said once, and not by each trainer
        environ = {**environ, "DTR_STORE": given.store}
    settings = Settings.load(environ=environ, redis_url=given.redis_url, job=given.job, staging=given.staging)
    find_command(what.command, environ)
    check_descriptors(what, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    must_answer = _why_it_must_answer(what, given, environ)
    with standing(settings, default_home(environ), must_answer=must_answer, uploader=given.uploader) as ground:
        with claimed(settings.staging, settings.job) as claim:
            if claim.index and what.nnodes == 1:
                whose = f"for job {settings.job}" + ("" if given.job else ", unless its trainers choose another,")
                log.warning("another launcher runs %s on this host; if their trainers belong together, use --nnodes", whose)
            places = seats(what, host=claim.host, index=claim.index, folder=claim.folder)
            status = run_trainers(what, places, settings=settings, job=given.job, environ=environ)
        if ground.uploads:
            _finish(settings.staging)
    return status


def _why_it_must_answer(what: Launch, given: Given, environ: Mapping[str, str]) -> str:
    """Why no server may be started in the coordinator's place; empty if one may."""
    origin = Settings.origins(environ=environ, redis_url=given.redis_url)["redis_url"]
    if origin.kind != "default":
        return f"it was named by {origin.place or '--url'}"
    return "--nnodes needs one that all hosts reach (--url)" if what.nnodes > 1 else ""


def _finish(staging: str) -> None:
    """Let the uploader commit what is staged, and give back the memory of trainers that have ended: it ends too soon to do that."""
    try:
        finish_uploads(staging, within_s=_UPLOADS_WITHIN_S)
        reclaim(staging)
    except OSError as exc:
        log.warning("the staging folder %s cannot be cleared up: %s", staging, exc)
