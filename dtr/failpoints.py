"""Named places where a test makes a process die, stop or fail: ``DTR_FAILPOINT="commit.before_manifest=kill"``.

Guarantee: no effect unless the variable is set, and a process that has it set without ``DTR_TESTING=1`` refuses to go on. Several
are separated by commas. Actions: ``kill`` (SIGKILL to itself), ``stop`` (SIGSTOP), ``raise`` (OSError), ``sleep:SECONDS``; each may
end in ``@PATH``, and then happens once over all processes: for the one that manages to create PATH.
"""

from __future__ import annotations

import os
import signal
import time
from functools import lru_cache
from pathlib import Path

from dtr.errors import ConfigError

__all__ = ["failpoint"]


@lru_cache(maxsize=8)
def _parse(text: str) -> dict[str, tuple[str, str]]:
    if os.environ.get("DTR_TESTING") != "1":
        raise ConfigError("DTR_FAILPOINT is for tests only (it kills processes): unset it, or set DTR_TESTING=1")
    parsed: dict[str, tuple[str, str]] = {}
    for item in text.split(","):
        name, _, action = item.partition("=")
        action, _, once = action.partition("@")
        if action.partition(":")[0] not in {"kill", "stop", "raise", "sleep"}:
            raise ConfigError(f"DTR_FAILPOINT: expected NAME=kill|stop|raise|sleep:SECONDS[@PATH], got {item!r}")
        parsed[name] = (action, once)
    return parsed


def failpoint(name: str) -> None:
    """Do what ``DTR_FAILPOINT`` asks at this place; nothing otherwise."""
    text = os.environ.get("DTR_FAILPOINT")
    if not text or (found := _parse(text).get(name)) is None:
        return
    action, once = found
    if once:
        try:
            Path(once).touch(exist_ok=False)
        except FileExistsError:
            return
    word, _, argument = action.partition(":")
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif word == "sleep":
        time.sleep(float(argument))
    else:
        raise OSError(f"failpoint {name}")
