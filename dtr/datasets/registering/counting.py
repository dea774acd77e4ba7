"""One process at a time counts a data set's samples. Owns ``dataset:NAME:counting``.

A key that expires, for speed only: whoever loses it counts as well, and both register the same.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Final

from dtr.errors import CoordinatorUnavailable
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["alone"]

log = logging.getLogger(__name__)

_LEASE_S: Final = 5.0
_POLL_S: Final = 0.1


@contextlib.contextmanager
def alone(state: JobState, name: str) -> Iterator[bool]:
    """Wait until nobody else counts the samples of this data set; yields whether somebody did, who may have registered it since."""
    key, token = state.keys.dataset_counting(name), secrets.token_hex(8)
    waited = False
    while not _acquired(state, key, token):
        if not waited:
            log.info("data set %s: another process counts its samples", name)
        waited = True
        time.sleep(_POLL_S)
    over = threading.Event()
    thread = threading.Thread(target=_renew, args=(state, key, token, over), name="dtr-count-lease", daemon=True)
    thread.start()
    try:
        yield waited
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(CoordinatorUnavailable), translate(state.url):
            if state.redis.get(key) == token:
                state.redis.delete(key)


def _acquired(state: JobState, key: str, token: str) -> bool:
    with translate(state.url):
        return bool(state.redis.set(key, token, nx=True, px=int(_LEASE_S * 1000))) or state.redis.get(key) == token


def _renew(state: JobState, key: str, token: str, over: threading.Event) -> None:
    while not over.wait(_LEASE_S / 3):
        with contextlib.suppress(CoordinatorUnavailable), translate(state.url):
            if state.redis.get(key) == token:
                state.redis.pexpire(key, int(_LEASE_S * 1000))
