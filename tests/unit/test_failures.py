"""What the next save says of the ones that failed: raise, warn or nothing, decided from values alone."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from dtr.checkpoint.saving.failures import Failed, Failures, Standing, sentence, verdict
from dtr.checkpoint.saving.handle import Commit, SaveHandle
from dtr.config import Settings
from dtr.errors import SaveFailed

RUN = "0002-b"


def failed(step: int, *, run: str = RUN, begun_s: float | None = None) -> Failed:
    return Failed(run=run, step=step, state="ABORTED", reason="disk full", begun_s=step if begun_s is None else begun_s)


def standing(*steps: int, safe_s: float = 0.0, run: str = RUN, undecided: tuple[tuple[int, float], ...] = ()) -> Standing:
    some = tuple(failed(step, run=run) for step in steps)
    handles = tuple((SaveHandle(run, step), begun_s) for step, begun_s in undecided)
    return Standing(untold=some, unresolved=some, undecided=handles, safe_s=safe_s)


def word(policy: str, now: Standing, *, now_s: float = 100.0, rpo_s: float = 50.0) -> tuple[str, list[int]]:
    found, about = verdict(policy, now, run=RUN, rpo_s=rpo_s, now_s=now_s)
    return found, [one.step for one in about]


@pytest.mark.parametrize("policy", ["fatal", "warn", "rpo"])
def test_nothing_is_said_where_nothing_failed(policy: str) -> None:
    """Also not of a last commit that is old: then the trainer just saves rarely."""
    assert word(policy, standing()) == ("", [])


def test_warn_never_raises() -> None:
    """However old the last commit is."""
    assert word("warn", standing(10, 20), now_s=1e9) == ("warn", [10, 20])


def test_fatal_raises_for_the_current_run_alone() -> None:
    """A save of an ended run is lost and made good by the restore: that is for the log."""
    assert word("fatal", standing(10)) == ("raise", [10])
    assert word("fatal", standing(10, run="0001-a")) == ("warn", [10])


@pytest.mark.parametrize(("safe_s", "expected"), [(51.0, "warn"), (49.0, "raise")])
def test_rpo_raises_once_the_last_commit_is_too_old(safe_s: float, expected: str) -> None:
    """At now 100 with 50 seconds allowed."""
    assert word("rpo", standing(60, 70, safe_s=safe_s)) == (expected, [60, 70])


def test_rpo_counts_failures_that_were_warned_of_and_saves_that_hang() -> None:
    """A failure stays until a newer state is committed; one that is undecided for longer than allowed is no better."""
    told = replace(standing(60), untold=())
    assert word("rpo", told) == ("raise", [60])
    assert word("rpo", standing(undecided=((60, 40.0),))) == ("raise", [60])
    assert word("rpo", standing(undecided=((60, 60.0),))) == ("", [])
    assert word("fatal", standing(undecided=((60, 40.0),))) == ("", [])


def test_the_sentence_says_what_failed_why_and_what_is_safe() -> None:
    """In one line."""
    text = sentence([failed(10), failed(20)], replace(standing(), newest=(RUN, 5), safe_s=40.0), 100.0)
    assert text == (
        "2 saves came to nothing, the newest of run 0002-b step 20 failed (ABORTED): disk full; the newest commit is 0002-b/5, of 60 s ago"
    )
    assert "nothing is committed" in sentence([failed(10)], standing(), 100.0)


def settings(policy: str, rpo_s: float = 50.0) -> Settings:
    return Settings.load(environ={}, on_failed_save=policy, rpo_s=rpo_s)


def test_each_failure_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """By one line, at the next save."""
    found = Failures()
    found.failed(failed(10))
    with caplog.at_level(logging.WARNING):
        found.tell(settings("warn"), RUN, 20.0)
        found.tell(settings("warn"), RUN, 30.0)
    assert [record.message.count("step 10") for record in caplog.records] == [1]


def test_a_save_goes_through_after_the_error() -> None:
    """Who catches it and saves again is not stopped for ever; a new failure raises again, and the facts name each."""
    found = Failures()
    for step in (10, 20):
        found.failed(failed(step))
        with pytest.raises(SaveFailed) as caught:
            found.tell(settings("fatal"), RUN, 25.0)
        assert caught.value.failed == [(RUN, step, "ABORTED", "disk full")]
        found.tell(settings("fatal"), RUN, 25.0)


def test_a_newer_commit_makes_failures_good() -> None:
    """An older one does not; nor does one that is learned of late."""
    found, handle = Failures(), SaveHandle(RUN, 1)
    found.begun(handle, 0.0)
    found.failed(failed(10))
    found.committed(RUN, 20, 20.0)
    found.committed(RUN, 5, 5.0)
    found.failed(failed(15))
    found.tell(settings("rpo"), RUN, 1000.0)  # warns: step 20 is newer than what failed
    found.failed(failed(30))
    with pytest.raises(SaveFailed, match=r"newest commit is 0002-b/20, of 980 s ago \(on_failed_save=rpo, rpo_s=50\)"):
        found.tell(settings("rpo"), RUN, 1000.0)


def test_before_the_first_commit_the_first_save_counts() -> None:
    """The time at stake runs from there."""
    found, handle = Failures(), SaveHandle(RUN, 1)
    found.begun(handle, 100.0)
    found.failed(failed(1, begun_s=100.0))
    found.tell(settings("rpo"), RUN, 149.0)
    with pytest.raises(SaveFailed):
        found.tell(settings("rpo"), RUN, 151.0)


def test_handles_that_are_decided_are_let_go() -> None:
    """A long training does not collect them."""
    found = Failures()
    for step in range(50):
        handle = SaveHandle(RUN, step)
        found.begun(handle, float(step))
        handle.commit(Commit(run=RUN, step=step, size_bytes=1, seconds=0.1))
    assert len(found._standing.undecided) == 1


def test_the_last_word_is_of_what_nobody_was_told(caplog: pytest.LogCaptureFixture) -> None:
    """A training ends with its last save: it has no next one that could tell."""
    found = Failures()
    found.failed(failed(10))
    found.tell(settings("warn"), RUN, 20.0)
    caplog.clear()
    found.last_word(30.0)
    assert not caplog.records
    found.failed(failed(20))
    found.last_word(30.0)
    assert "step 20 failed" in caplog.records[0].message
