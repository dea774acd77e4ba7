"""URLs of Redis: what is refused, in one line, with every password masked."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from redis import exceptions as rx

from dtr.errors import BY_CODE, BarrierTimeout, ConfigError, CoordinatorRefused, CoordinatorUnavailable, DtrError, RosterChanged
from dtr.state.client import check_url, mask, translated
from dtr.state.scripts import error_of


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://h:6379/0", "unknown scheme 'http'"),
        ("redis://", "no host"),
        ("redis:///0", "no host"),
        ("redis://h:99999/0", "port"),
        ("redis://h:port/0", "port"),
        ("redis://h:0/0", "port 0"),
        ("redis://u:p@ss@h:6379/0", "must be written %40"),
        ("redis://:p#ss@h:6379/0", "percent-encoded"),
        ("redis://h:6379/zero", "database must be a number"),
        ("localhost:6379", "unknown scheme"),
        ("", "unknown scheme"),
        (None, "a URL is text"),
    ],
)
def test_a_wrong_url_is_refused(url: Any, why: str) -> None:
    """Scheme, host, port, database and an unescaped character of a password."""
    with pytest.raises(ConfigError, match=why) as caught:
        check_url(url)
    assert "ss@h" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:6379/0", "rediss://u:p%40ss@h:1/3", "unix:///run/redis.sock", "redis://[::1]:6379"])
def test_a_good_url_is_kept(url: str) -> None:
    """What redis-py takes."""
    assert check_url(url) == url


def test_a_plain_port_behind_rediss_is_hinted_at() -> None:
    """A server that speaks no TLS only lets the handshake time out."""
    assert "its URL begins with redis://" in str(translated(rx.TimeoutError("Timeout connecting to server"), "rediss://h:6379/0"))
    assert "dtr up" in str(translated(rx.TimeoutError("Timeout connecting to server"), "redis://h:6379/0"))


def test_passwords_are_masked() -> None:
    """The user stays, so that one sees which one it is."""
    assert mask("redis://u:secret@h:1/0") == "redis://u:***@h:1/0"
    assert mask("redis://:secret@h:1/0") == "redis://:***@h:1/0"
    assert mask("redis://h:1/0") == "redis://h:1/0"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (rx.AuthenticationError("WRONGPASS invalid"), CoordinatorRefused),
        (rx.NoPermissionError("NOPERM no"), CoordinatorRefused),
        (rx.ResponseError("OOM command not allowed"), CoordinatorRefused),
        (rx.ResponseError("LOADING"), CoordinatorUnavailable),
        (rx.ConnectionError("refused"), CoordinatorUnavailable),
        (rx.TimeoutError("slow"), CoordinatorUnavailable),
        (ConnectionResetError(), CoordinatorUnavailable),
    ],
)
def test_errors_of_redis_are_translated(error: Exception, kind: type[DtrError]) -> None:
    """Refusals are told from outages, because retrying helps only against the latter."""
    found = translated(error, "redis://:secret@h:1/0")
    assert type(found) is kind
    assert "secret" not in str(found)


def test_errors_of_dtr_pass_unchanged() -> None:
    """One that is also a TimeoutError is not taken for an outage of Redis."""
    error = BarrierTimeout("late")
    assert translated(error, "redis://h") is error
    assert translated(KeyError("x"), "redis://h").__class__ is KeyError


def test_a_scripts_code_becomes_its_exception() -> None:
    """With the detail as message; a code that is none of ours is not guessed at."""
    for code, kind in BY_CODE.items():
        found = error_of(rx.ResponseError(f"{code} the detail"))
        assert type(found) is kind
        assert found.message == "the detail"
    assert error_of(rx.ResponseError("ERR other")) is None


def test_errors_keep_their_facts_when_pickled() -> None:
    """They cross process boundaries (Celery, DataLoader workers) whole."""
    error = RosterChanged("run ended", rank=2, worker="w")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.message, again.rank, again.worker) == (RosterChanged, "run ended", 2, "w")


def test_the_docstring_is_the_default_message() -> None:
    """An error without a message still says what it is."""
    assert "call start" not in str(RosterChanged())
    assert "Call form()" in str(RosterChanged())
