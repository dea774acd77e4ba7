"""Barrier rounds: one final state, the same for all, and an exact list of who is missing, on every engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtr.errors import BarrierBroken, BarrierError, BarrierMembersConflict, BarrierTimeout, RosterChanged, StaleIncarnation
from dtr.membership import join
from dtr.state.job import JobState
from tests.lua.jobs import TTL_MS, arrive, formed, leave, meet, time_out


def test_the_last_arrival_releases_the_round(job_state: JobState) -> None:
    """Two of two: the first waits, the second releases, and asking again changes nothing."""
    (a, b), run = formed(job_state, "a", "b")
    assert meet(job_state, a, run) == 0
    assert meet(job_state, b, run)[0] == "RELEASED"
    assert meet(job_state, a, run)[0] == "RELEASED"
    r = job_state.keys.barrier("b", run.id, 0)
    assert job_state.redis.xlen(r.wake) == 1
    assert 0 < job_state.redis.ttl(r.round) <= 60


def test_a_hundred_retries_of_one_arrival_count_once(job_state: JobState) -> None:
    """Given one member that arrives a hundred times, then the round still waits for the other."""
    (a, _b), run = formed(job_state, "a", "b")
    assert {meet(job_state, a, run) for _ in range(100)} == {0}
    assert job_state.redis.hget(job_state.keys.barrier("b", run.id, 0).round, "arrived") == "1"


def test_a_departed_member_breaks_the_round_for_all_alike(job_state: JobState) -> None:
    """The one that waits and the one that comes late get the same verdict: who departed, why, and who had not arrived."""
    (a, b, c, d), run = formed(job_state, "a", "b", "c", "d")
    meet(job_state, a, run)
    meet(job_state, c, run)
    leave(job_state, b, "signal 9")
    messages = set()
    for late in (a, c, d):
        with pytest.raises(BarrierBroken) as caught:
            meet(job_state, late, run)
        messages.add(caught.value.message.split(" script:")[0])
    (message,) = messages
    assert message.startswith("rank 1 (b) departed: signal 9 | 1:b 3:d")


def test_a_round_that_was_released_stays_released_after_a_death(job_state: JobState) -> None:
    """A release is final: a member that asks again after another's death has passed."""
    (a, b), run = formed(job_state, "a", "b")
    meet(job_state, a, run)
    meet(job_state, b, run)
    leave(job_state, b)
    assert meet(job_state, a, run)[0] == "RELEASED"
    with pytest.raises(RosterChanged, match="rank 1 .b. departed"):
        meet(job_state, a, run, seq=1)


def test_the_first_timeout_ends_the_round_for_all(job_state: JobState) -> None:
    """Later arrivals and later timeouts get the same error, with the same list."""
    (a, b, c), run = formed(job_state, "a", "b", "c")
    meet(job_state, a, run)
    with pytest.raises(BarrierTimeout, match="1 of 3 arrived within the 5 s of a . 1:b 2:c"):
        time_out(job_state, a, run)
    with pytest.raises(BarrierTimeout, match="1:b 2:c"):
        meet(job_state, b, run)
    with pytest.raises(BarrierTimeout, match="1:b 2:c"):
        time_out(job_state, c, run)


def test_a_timeout_that_meets_a_release_is_a_pass(job_state: JobState) -> None:
    """Given a released round, when a member's wait times out, then it has passed."""
    (a, b), run = formed(job_state, "a", "b")
    meet(job_state, a, run)
    meet(job_state, b, run)
    assert time_out(job_state, a, run)[0] == "RELEASED"


def test_a_round_that_never_was_is_an_error(job_state: JobState) -> None:
    """Nobody passes a barrier that does not exist."""
    (a, _b), run = formed(job_state, "a", "b")
    with pytest.raises(BarrierError, match="no such round"):
        time_out(job_state, a, run)


def test_a_member_that_slept_through_an_expired_release_passes(job_state: JobState) -> None:
    """Given a release whose keys have expired, when a member asks for that round, then it does not open it anew."""
    (a, b), run = formed(job_state, "a", "b")
    meet(job_state, a, run)
    meet(job_state, b, run)
    r = job_state.keys.barrier("b", run.id, 0)
    job_state.redis.delete(r.round, r.arrived, r.wake)
    assert meet(job_state, a, run)[0] == "RELEASED"
    assert job_state.redis.exists(r.round) == 0
    assert meet(job_state, a, run, seq=1) == 0


def test_a_zombie_cannot_arrive(job_state: JobState) -> None:
    """A member that was replaced is refused, and its arrival does not count."""
    (a, b), run = formed(job_state, "a", "b")
    meet(job_state, b, run)
    join(job_state, replace(a, incarnation="a2"), ttl_ms=TTL_MS)
    with pytest.raises(BarrierBroken, match="takeover"):
        meet(job_state, a, run)
    with pytest.raises(RosterChanged):
        meet(job_state, a, run, seq=1)


def test_another_incarnation_of_an_open_run_is_stale(job_state: JobState) -> None:
    """Given an open run, when somebody arrives with a wrong incarnation, then it is refused as stale."""
    (a, _b), run = formed(job_state, "a", "b")
    with pytest.raises(StaleIncarnation):
        meet(job_state, replace(a, incarnation="wrong"), run)


def test_subsets_meet_by_themselves_and_must_agree(job_state: JobState) -> None:
    """Two of three meet; a member that expects another set is told both sets."""
    (a, b, c), run = formed(job_state, "a", "b", "c")
    assert meet(job_state, a, run, "pair", subset='["a","c"]') == 0
    with pytest.raises(BarrierMembersConflict, match="the whole roster"):
        meet(job_state, b, run, "pair")
    assert meet(job_state, c, run, "pair", subset='["a","c"]')[0] == "RELEASED"
    meet(job_state, a, run, "late", subset='["a","c"]')
    with pytest.raises(BarrierTimeout, match=r"\| 2:c"):
        time_out(job_state, a, run, "late", subset='["a","c"]')


def test_a_waiting_newcomer_is_announced_to_all_in_the_same_round(job_state: JobState) -> None:
    """Given room to grow and a newcomer that waits, when a round is released, then its verdict asks everyone to form."""
    (a, b), run = formed(job_state, "a", "b", spare=1)
    c = replace(a, worker_id="c", incarnation="c1")
    join(job_state, c, ttl_ms=TTL_MS)
    meet(job_state, a, run)
    assert meet(job_state, b, run)[1] == ""
    arrive(job_state, c, low=2, high=3, number=2)
    meet(job_state, a, run, seq=1)
    assert meet(job_state, b, run, seq=1)[1] == "form"
    assert meet(job_state, a, run, seq=1)[1] == "form"


def test_one_name_is_for_one_member_set_also_after_its_release(job_state: JobState) -> None:
    """Given a round of a pair that was released, when others use the name for another set, then they are told and do not pass."""
    (a, b, c), run = formed(job_state, "a", "b", "c")
    for who in (a, b):
        meet(job_state, who, run, "node", subset='["a","b"]')
    for subset in ('["b","c"]', ""):
        with pytest.raises(BarrierMembersConflict, match="a name of its own"):
            meet(job_state, c, run, "node", subset=subset)
    r = job_state.keys.barrier("node", run.id, 0)
    job_state.redis.delete(r.round, r.arrived, r.wake)
    with pytest.raises(BarrierMembersConflict, match="a name of its own"):
        meet(job_state, c, run, "node")


def test_a_sleeper_gets_the_wish_to_form_of_its_expired_round(job_state: JobState) -> None:
    """Given a release that asked everyone to form and has expired, when a late waiter asks, then it gets the same answer."""
    (a, b), run = formed(job_state, "a", "b", spare=1)
    c = replace(a, worker_id="c", incarnation="c1")
    join(job_state, c, ttl_ms=TTL_MS)
    arrive(job_state, c, low=2, high=3, number=2)
    meet(job_state, a, run)
    meet(job_state, b, run)
    r = job_state.keys.barrier("b", run.id, 0)
    job_state.redis.delete(r.round, r.arrived, r.wake)
    assert meet(job_state, a, run) == ["RELEASED", "form"]
