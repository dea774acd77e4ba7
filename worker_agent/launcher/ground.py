"""What a launch stands on: a coordinator that answers, and an uploader for this host, so that saves commit.

Guarantees: a coordinator that was named and does not answer is an error, never replaced by an empty one; what is started here ends
with the last launch that uses it, however that one ends; what was there before is left alone.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from redis import exceptions as rx

from dtr.checkpoint.staging.slots import scan
from dtr.config import Settings
from dtr.errors import CoordinatorRefused, CoordinatorUnavailable
from dtr.host import host_id
from dtr.stack import Stack, server
from dtr.stack.services import Plan, uploader_service
from dtr.stack.stack import make_plan
from dtr.state.client import check_url, mask

__all__ = ["Facts", "Ground", "Need", "decide", "finish_uploads", "standing"]

log = logging.getLogger(__name__)

_LOOK_AGAIN_S: Final = 0.2
_REMIND_S: Final = 5.0


class Need(enum.Enum):
    """What is missing."""

    NOTHING = "nothing"
    STACK = "a local stack, which may have a server to start, an uploader, or both"
    UPLOADER = "an uploader alone, beside a server that others run"
    SERVER = "the coordinator, and none may be started in its place"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was found.

    ``answers``: something, at the URL; ``must_answer``: no server may be started there; ``stack_is_up``: the local one of this home,
    with its server at the URL; ``uploader_is_there``: one for this host.
    """

    answers: bool
    must_answer: bool
    stack_is_up: bool
    uploader_is_there: bool
    uploader_wanted: bool


def decide(facts: Facts) -> Need:
    """What to see to. A local stack that is up already is held on to: whoever started it may end before this launch."""
    if not facts.answers:
        return Need.SERVER if facts.must_answer else Need.STACK
    if facts.stack_is_up:
        return Need.STACK
    return Need.UPLOADER if facts.uploader_wanted and not facts.uploader_is_there else Need.NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """``uploads``: an uploader runs that may end together with this launch."""

    uploads: bool


@contextlib.contextmanager
def standing(settings: Settings, home: Path, *, must_answer: str, uploader: bool) -> Iterator[Ground]:
    """See to it that a coordinator and an uploader are there, for the time of the block.

    Args:
        settings: with the coordinator's URL and the staging folder.
        home: of the local stack.
        must_answer: why no server may be started in place of one that does not answer; empty if one may.
        uploader: whether an uploader is wanted.

    Raises:
        CoordinatorUnavailable: nothing answers at the URL that was named, or it refuses.
        Unavailable, ConfigError: what is missing cannot be started.
    """
    url = check_url(settings.redis_url)
    with contextlib.ExitStack() as stack:
        borrowed = False
        need = decide(_look(settings, home, must_answer=bool(must_answer), uploader=uploader))
        if need is Need.SERVER:
            raise CoordinatorUnavailable(
                f"Redis at {mask(url)} cannot be reached, and none is started in its place: {must_answer}. Start it, or correct the URL."
            )
        if need is Need.STACK:
            local = Stack(home, settings, flower=False, planner=make_plan if uploader else _without_uploader)
            borrowed = _borrow(stack, local, f"nothing answers at {mask(url)}")
            need = decide(replace(_look(settings, home, must_answer=bool(must_answer), uploader=uploader), stack_is_up=False))
        if need is Need.UPLOADER:  # none at all, or that of the local stack is for another staging folder
            local = Stack(_uploader_home(home, settings), settings, flower=False)
            borrowed = _borrow(stack, local, "this host has no uploader, without which saves are not committed") or borrowed
        yield Ground(uploads=borrowed and uploader)


def _look(settings: Settings, home: Path, *, must_answer: bool, uploader: bool) -> Facts:
    url = settings.redis_url
    answers = _answers(url)
    host_id(settings.staging)  # so that an uploader of this host can be told from others
    return Facts(
        answers=answers,
        must_answer=must_answer,
        stack_is_up=answers and _serves(home, settings),
        uploader_is_there=answers and uploader and uploader_service(settings).probe.answers(url),
        uploader_wanted=uploader,
    )


def _answers(url: str) -> bool:
    """Whether a Redis that trainers can use is there; raises CoordinatorUnavailable if something else is, or if it refuses."""
    try:
        return server.look(url) is not None
    except CoordinatorRefused as exc:
        if isinstance(exc.__cause__, rx.NoPermissionError):
            return True  # it knows the user, who may not use INFO: a trainer need not
        raise


def _serves(home: Path, settings: Settings) -> bool:
    """Whether the stack of this home is up at the URL of these settings."""
    record = Stack(home, settings).status()
    return record is not None and _database(record.url) == _database(mask(settings.redis_url))


def _database(url: str) -> tuple[object, str]:
    """The same for two spellings of one local database; ``url`` is masked."""
    local = server.address(url)
    return (local[1], urlsplit(url).path.strip("/") or "0") if local is not None else (url, "")


def _borrow(stack: contextlib.ExitStack, local: Stack, why: str) -> bool:
    """Hold on to a local stack until the end of ``stack``, started if need be; whether it may end with us."""
    if local.status() is None:
        log.info("%s: starting what is missing, for the time of this run", why)
    found = stack.enter_context(local.borrowed())
    if found.started:
        names = ", ".join(f"{service.name} ({service.address})" for service in found.record.services)
        log.info("started %s; logs in %s", names, local.home.path / "log")
    for note in found.notes:
        log.info("%s", note)
    return not local.home.kept


def _without_uploader(home: Any, settings: Settings, *, flower: bool) -> Plan:
    plan = make_plan(home, settings, flower=flower)
    stages = (tuple(service for service in stage if service.name != "uploader") for stage in plan.stages)
    return replace(plan, stages=tuple(stage for stage in stages if stage))


def _uploader_home(home: Path, settings: Settings) -> Path:
    """A folder of its own for each (server, staging folder), so that all launches there share one uploader."""
    told_apart = f"{settings.redis_url}\n{os.path.abspath(settings.staging)}"
    return home / "uploaders" / hashlib.sha256(told_apart.encode()).hexdigest()[:12]


def finish_uploads(staging: str, *, within_s: float) -> int:
    """Give the uploader time for what is staged on this host now; saves that others stage meanwhile are theirs.

    Args:
        staging: the folder.
        within_s: then what is left stays there; the next uploader of this host commits it.

    Returns how many parts are left.
    """
    waiting_for = _staged(staging)
    deadline = time.monotonic() + within_s
    remind_at = time.monotonic() + _LOOK_AGAIN_S
    while waiting_for and time.monotonic() < deadline:
        if time.monotonic() >= remind_at:
            log.info("waiting for the uploader: %d staged parts are not committed yet (Ctrl-C leaves them)", len(waiting_for))
            remind_at = time.monotonic() + _REMIND_S
        time.sleep(_LOOK_AGAIN_S)
        waiting_for &= _staged(staging)
    if waiting_for:
        log.warning("%d staged parts are not committed; they stay in %s for the next uploader of this host", len(waiting_for), staging)
    return len(waiting_for)


def _staged(staging: str) -> set[str]:
    """The saves that wait for their upload."""
    return {slot.record.save for slot in scan(staging) if slot.kind == "STAGED" and slot.record is not None}
