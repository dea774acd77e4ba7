"""Requests to a service that are sent again where that helps, by one rule for all services.

The libraries' own retries are off: they would send a conditional write again whose answer was lost, and the second would meet the first's
object: a win reported as a loss. Here a write that may have had its effect is not sent again unless that is harmless, and each retry is
logged.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from dtr.clock import Clock
from dtr.errors import AlreadyExists, ConfigError, DtrError

__all__ = ["ATTEMPTS", "FIRST_PAUSE_S", "LONGEST_PAUSE_S", "Failure", "send"]

_log = logging.getLogger(__name__)
ATTEMPTS: Final = 5
FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 5.0

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed request: the error that stands for it, whether sending again may help, whether it may have had its effect."""

    error: DtrError
    retry: bool = False
    unknown: bool = False


def send(
    once: Callable[[], Answer],
    failure_of: Callable[[Exception], Failure],
    *,
    clock: Clock,
    conditional: bool = False,
    again: bool = True,
    before_retry: Callable[[], None] | None = None,
) -> tuple[Answer, int]:
    """What ``once`` returns, called up to five times, with pauses that grow; and how often it was called.

    Args:
        once: sends the request.
        failure_of: what an exception of it means; passes on what is none of the service's.
        clock: for the pauses.
        conditional: not to be sent again once it may have had its effect.
        again: False: not to be sent again at all.
        before_retry: may raise to give up.

    Raises:
        DtrError: that of the last failure. An AlreadyExists says by the fact ``maybe_ours`` whether an earlier send may have won.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return once(), attempt
        except ConfigError:
            raise
        except Exception as exc:
            failure = failure_of(exc)
            if isinstance(failure.error, AlreadyExists):
                failure.error.facts["maybe_ours"] = attempt > 1
            if not again or not failure.retry or attempt >= ATTEMPTS or (conditional and failure.unknown):
                raise failure.error from exc
        if before_retry:
            before_retry()
        longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
        pause_s = random.uniform(longest_s / 2, longest_s)
        _log.warning("attempt %d of %d failed, again in %.1f s: %s", attempt, ATTEMPTS, pause_s, failure.error)
        clock.sleep(pause_s)
