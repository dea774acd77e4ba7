"""Words for people: times, sizes, lists, sentences about events."""

from __future__ import annotations

import pytest

from dtr.cli.sentences import moment, sentence, style
from dtr.state.scripts import catalogue
from dtr.views.events import Event
from dtr.views.words import count_of, duration, size, some


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (119, "119 s"), (120, "2 min"), (7_199, "120 min"), (7_200, "2 h"),
     (172_799, "48 h"), (172_800, "2 d"), (31_536_000, "365 d")],
)  # fmt: skip
def test_a_duration_has_one_unit(seconds, text):
    """The unit changes where a person would change it."""
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1536, "1.50 KiB"), (10 << 20, "10.0 MiB"), (123 << 20, "123 MiB"),
     (1000 << 20, "0.98 GiB"), (5 << 60, "5120 PiB")],
)  # fmt: skip
def test_a_size_has_three_digits(size_bytes, text):
    """Never a four-digit number, except beyond the last unit."""
    assert size(size_bytes) == text


def test_long_lists_are_cut_and_counted():
    """The first few, and how many there are beyond."""
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdefg")) == "a, b, c, d and 3 more"
    assert some([]) == ""


def test_counts_agree_with_their_noun():
    """One member, two members; irregular ones are given."""
    assert (count_of(1, "member"), count_of(0, "member"), count_of(2, "entry", "entries")) == ("1 member", "0 members", "2 entries")


def event(kind: str, **fields: str) -> Event:
    return Event(id="1795442830123-0", at_ms=1795442830123, event=kind, fields=fields)


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        ("joined", {"worker": "n-1", "host": "h", "pid": "7", "generation": "3"}, "n-1 on h, process 7, generation 3"),
        ("departed", {"worker": "n-1", "incarnation": "a", "reason": "signal 9"}, "n-1: signal 9"),
        ("run_formed", {"run": "0002-b", "world_size": "1", "previous": "0001-a"}, "0002-b with 1 rank after 0001-a"),
        ("run_ended", {"run": "0001-a", "worker": "n-1", "rank": "1", "reason": "exit 1"}, "0001-a: rank 1 (n-1) departed: exit 1"),
        (
            "barrier_broken",
            {"round": "dtr:{team/job}:barrier:step:0001-a:41", "reason": "rank 1 (n-1) departed: signal 9", "missing": "1:n-1 2:n-2"},
            "step round 41 of run 0001-a: rank 1 (n-1) departed: signal 9; missing: n-1 (rank 1), n-2 (rank 2)",
        ),
        ("ckpt_committed", {"run": "0001-a", "step": "400", "size_bytes": "1048576", "reason": ""}, "0001-a/400, 1.00 MiB"),
        ("stalled", {"worker": "w", "step": "7", "reason": "no progress for 5 s"}, "w at step 7: no progress for 5 s"),
        ("resumed", {"worker": "w", "step": "", "after_ms": "4200"}, "w goes on after 4.2 s"),
        (
            "save_failed",
            {"run": "0001-a", "step": "4", "rank": "1", "worker": "w", "state": "CONFLICT", "reason": "other bytes"},
            "0001-a/4 of rank 1 (w), conflict: other bytes",
        ),
        ("ckpt_aborting", {"run": "0001-a", "step": "4", "rank": "1", "reason": "disk full"}, "0001-a/4: disk full"),
        ("ckpt_sealed", {"run": "0001-a", "step": "4"}, "0001-a/4"),
        ("unheard_of", {"a": "1", "b": "x y"}, "a=1 b=x y"),
        ("joined", {"worker": "n-1"}, "worker=n-1"),
    ],
)
def test_an_event_is_a_sentence(kind, fields, text):
    """Known kinds read like prose; unknown ones, and known ones with other fields, show what they have."""
    assert sentence(event(kind, **fields)) == text


def test_every_kind_of_event_that_a_script_emits_can_be_shown():
    """No event without fields, whatever its kind, ends in an error or in silence about its fields."""
    import re

    kinds = {kind for script in catalogue() for kind in re.findall(r"emit\(events, '(\w+)'", script.text)}
    assert {"joined", "departed", "run_formed", "run_ended"} <= kinds
    for kind in kinds:
        assert sentence(event(kind, surprise="yes")) == "surprise=yes"
        assert style(event(kind)) in {"", "red", "yellow", "green"}


def test_a_moment_is_local_time(monkeypatch):
    """The time is shown in the zone of whoever looks."""
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert moment(1795442830123) == "11-23 14:07:10"
    monkeypatch.delenv("TZ")
    time.tzset()
