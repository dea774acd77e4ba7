"""Members become runs: ranks, elasticity, and who must be there, on every engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtr.errors import InvalidInput, StaleIncarnation
from dtr.membership import join
from dtr.runs import read_run
from dtr.state.job import JobState
from tests.lua.jobs import TTL_MS, arrive, formed, joined, leave


def test_the_last_arrival_forms_the_run_for_all(job_state: JobState) -> None:
    """Three members, three arrivals: two wait, the third forms, and the first two find the same run when they ask again."""
    a, b, c = joined(job_state, "a", "b", "c")
    assert [arrive(job_state, w, low=3, high=3)[0] for w in (a, b, c)] == ["wait", "wait", "formed"]
    answers = [arrive(job_state, w, low=3, high=3) for w in (a, b, c)]
    assert len({answer[1] for answer in answers}) == 1
    run = read_run(job_state, answers[0][1], worker_id="a")
    assert sorted(m.rank for m in run.roster.values()) == [0, 1, 2]
    assert run.world_size == 3


def test_asked_ranks_are_kept_and_gaps_are_filled(job_state: JobState) -> None:
    """Given wishes 2, 2, 9 and none, ranks are 0 to 3, each once, and the one wish that can be kept is kept."""
    who = joined(job_state, "a", "b", "c", "d")
    for member, wish in zip(who, (2, 2, 9, -1), strict=True):
        answer = arrive(job_state, member, low=4, high=4, rank=wish)
    ranks = {worker: member.rank for worker, member in read_run(job_state, answer[1]).roster.items()}
    assert sorted(ranks.values()) == [0, 1, 2, 3]
    assert ranks["a"] == 2


def test_a_living_member_of_the_last_run_holds_the_others_back(job_state: JobState) -> None:
    """Given a run of three of which one died, when one survivor and a newcomer arrive, then they wait for the other survivor."""
    (a, b, c), run = formed(job_state, "a", "b", "c")
    leave(job_state, c)
    (d,) = [replace(a, worker_id="d", incarnation="d1")]
    join(job_state, d, ttl_ms=TTL_MS)
    assert arrive(job_state, a, low=2, high=3, number=2, after=run.id)[0] == "wait"
    assert arrive(job_state, d, low=2, high=3, number=2)[0] == "wait"
    assert arrive(job_state, b, low=2, high=3, number=2, after=run.id)[0] == "formed"


def test_survivors_keep_their_ranks_where_they_fit(job_state: JobState) -> None:
    """Given ranks 0 to 3 of which 1 died, when three form again without wishes, then 0 and 2 stay and 3 fills the gap."""
    who, run = formed(job_state, "a", "b", "c", "d")
    leave(job_state, who[1])
    for member in (who[0], who[2], who[3]):
        answer = arrive(job_state, member, low=3, high=3, number=2, after=run.id)
    ranks = {worker: member.rank for worker, member in read_run(job_state, answer[1]).roster.items()}
    assert ranks == {"a": 0, "c": 2, "d": 1}


def test_an_elastic_run_waits_for_newcomers_to_settle(job_state: JobState) -> None:
    """Given enough members for the minimum, when one arrives, then it waits for settle_ms; the maximum closes at once."""
    a, b, c = joined(job_state, "a", "b", "c")
    arrive(job_state, a, low=2, high=3, settle_ms=60_000)
    waited = arrive(job_state, b, low=2, high=3, settle_ms=60_000)
    assert waited[0] == "wait"
    assert 0 < waited[2] <= 60_000
    assert arrive(job_state, c, low=2, high=3, settle_ms=60_000)[0] == "formed"


def test_more_members_than_seats_leaves_the_surplus_waiting(job_state: JobState) -> None:
    """Members of the last run have the first claim on a seat; the others go on waiting and do not end the run."""
    (a, b), run = formed(job_state, "a", "b")
    c = replace(a, worker_id="c", incarnation="c1")
    join(job_state, c, ttl_ms=TTL_MS)
    assert arrive(job_state, c, low=2, high=2, number=2, rank=0)[0] == "wait"
    leave(job_state, b)
    assert arrive(job_state, a, low=2, high=2, number=2, after=run.id)[0] == "formed"
    assert set(read_run(job_state, job_state.redis.hget(job_state.keys.meta, "run")).roster) == {"a", "c"}


def test_a_dead_arrival_does_not_count(job_state: JobState) -> None:
    """Given that one arrived and died, when the others arrive, then the run waits for its successor."""
    a, b, c = joined(job_state, "a", "b", "c")
    arrive(job_state, a, low=3, high=3)
    leave(job_state, a)
    arrive(job_state, b, low=3, high=3)
    assert arrive(job_state, c, low=3, high=3)[:2] == ["wait", 2]
    again = replace(a, incarnation="a2")
    join(job_state, again, ttl_ms=TTL_MS)
    with pytest.raises(StaleIncarnation):
        arrive(job_state, a, low=3, high=3)
    assert arrive(job_state, again, low=3, high=3)[0] == "formed"


def test_members_that_disagree_on_the_world_size_are_told(job_state: JobState) -> None:
    """The second world size is refused with both in the message, and the first arrival stands."""
    a, b = joined(job_state, "a", "b")
    arrive(job_state, a, low=2, high=2)
    with pytest.raises(InvalidInput, match="asks for 3 to 3, the members that are forming for 2 to 2"):
        arrive(job_state, b, low=3, high=3)
    assert job_state.redis.hkeys(job_state.keys.forming) == ["a"]


def test_a_used_number_is_proposed_again(job_state: JobState) -> None:
    """Given that a run took number 1, when a caller that does not know proposes 1, then it is told the counter."""
    (a,), run = formed(job_state, "a")
    assert arrive(job_state, a, low=1, high=1, number=1, after=run.id) == ["again", 1]
    assert arrive(job_state, a, low=1, high=1, number=2, after=run.id)[0] == "formed"


def test_a_thousand_members_form_one_run(job_state: JobState) -> None:
    """Rosters longer than unpack can hold are written whole."""
    names = [f"w{n:04d}" for n in range(1_000)]
    who = joined(job_state, *names)
    k = job_state.keys
    job_state.redis.hset(k.forming, mapping={w.worker_id: f"{w.incarnation} -1 h" for w in who[:-1]})
    answer = arrive(job_state, who[-1], low=1_000, high=1_000)
    run = read_run(job_state, answer[1])
    assert sorted(m.rank for m in run.roster.values()) == list(range(1_000))
    assert job_state.redis.hlen(k.roster) == 1_002
    assert job_state.redis.hlen(k.forming) == 0
