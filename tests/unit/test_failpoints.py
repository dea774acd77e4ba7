"""Failpoints are off unless a test turns them on."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtr.errors import ConfigError
from dtr.failpoints import _parse, failpoint


@pytest.fixture(autouse=True)
def forgotten() -> None:
    _parse.cache_clear()


def test_no_effect_without_the_variable() -> None:
    """The usual case costs a look at the environment."""
    failpoint("anything")


def test_refused_outside_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable left over from a test must not kill a real trainer in silence."""
    monkeypatch.setenv("DTR_FAILPOINT", "a=kill")
    with pytest.raises(ConfigError, match="for tests only"):
        failpoint("a")


def test_happens_at_its_place_and_once_where_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other places are not touched; with @PATH it happens to the first that comes."""
    monkeypatch.setenv("DTR_TESTING", "1")
    monkeypatch.setenv("DTR_FAILPOINT", f"a=raise@{tmp_path / 'once'},b=raise")
    failpoint("c")
    with pytest.raises(OSError, match="failpoint a"):
        failpoint("a")
    failpoint("a")
    for _ in range(2):
        with pytest.raises(OSError, match="failpoint b"):
            failpoint("b")


@pytest.mark.parametrize("text", ["a", "a=explode", "=kill@", "a=kill,b"])
def test_a_wrong_setting_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failpoint that cannot fire would make its test pass for nothing."""
    monkeypatch.setenv("DTR_TESTING", "1")
    monkeypatch.setenv("DTR_FAILPOINT", text)
    if text == "=kill@":
        failpoint("a")
        return
    with pytest.raises(ConfigError, match="expected NAME="):
        failpoint("a")
