"""Wait for a store or a Redis that is away for a while; one that refuses is not waited for."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Final, TypeVar

from dtr.clock import SYSTEM, Clock
from dtr.errors import CoordinatorRefused, StoreRefused, Unavailable

__all__ = ["patiently"]

log = logging.getLogger(__name__)

LONGEST_PAUSE_S: Final = 5.0
T = TypeVar("T")


def patiently(
    call: Callable[[], T], *, patience_s: float, what: str, check: Callable[[], object] = lambda: None, clock: Clock = SYSTEM
) -> T:
    """What ``call`` returns, tried again with a growing, random pause while it raises Unavailable.

    Args:
        call: safe to repeat.
        patience_s: then its error is raised.
        what: cannot be done meanwhile, for the log.
        check: asked before each further attempt; what it raises ends the wait.
        clock: for the wait.

    Raises:
        Unavailable: it stayed away. At once: StoreRefused, CoordinatorRefused, which do not pass by waiting.
    """
    deadline, pause_s, said = clock.monotonic() + patience_s, 0.1, ""
    while True:
        try:
            return call()
        except (StoreRefused, CoordinatorRefused):
            raise
        except Unavailable as exc:
            if clock.monotonic() >= deadline:
                raise
            if str(exc) != said:
                said = str(exc)
                log.warning("%s not yet: %s", what, exc)
        check()
        clock.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
