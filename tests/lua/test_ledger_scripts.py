"""Leases, reports and the end of an epoch: each rule of the ledger's scripts, on every engine."""

from __future__ import annotations

from typing import Any

import pytest

from dtr.datasets.consuming.datastate import Dynamic
from dtr.datasets.consuming.ledger import KEEP_MS, Leased, base_digest, taken_bits
from dtr.errors import DataConflict, LedgerUnset, RosterChanged, StaleIncarnation, StateLost
from dtr.membership import Identity
from dtr.runs import Run, read_run
from dtr.state.job import JobState
from tests.lua.jobs import arrive, formed, leave

SHARDS = 11  # no multiple of 8: the bitmap's last byte has bits that are no shards


def seat(who: Identity, run: Run) -> list[Any]:
    return [who.state_id, run.id, who.worker_id, run.roster[who.worker_id].rank, who.incarnation]


def base(done: tuple[tuple[int, int], ...] = (), **facts: Any) -> Dynamic:
    return Dynamic(**{"version": 1, "digest": "d", "seed": 0, "done": done, **facts})


def open_ledger(state: JobState, who: Identity, run: Run, start: Dynamic | None = None) -> str:
    """One rank sets the base."""
    k, start = state.keys, start or base()
    keys = k.ledger("numbers", start.epoch, run.id)
    facts = [start.version, start.digest, "dynamic", start.seed, SHARDS, base_digest(start), taken_bits(start, SHARDS), KEEP_MS]
    return str(state.call("ledger_open", [k.meta, k.roster, k.run(run.id), keys.ledger, keys.taken], [*seat(who, run), *facts]))


def lease(
    state: JobState,
    who: Identity,
    run: Run,
    *candidates: int,
    want: int = 1,
    have: int = 0,
    known: int = 0,
    start: int = -1,
    number: int = 1,
) -> str:
    """One lease."""
    k = state.keys
    keys = k.ledger("numbers", 0, run.id)
    args = [*seat(who, run), have, want, known, start, KEEP_MS, " ".join(map(str, candidates)), number]
    where = [k.meta, k.roster, k.fences, keys.ledger, keys.taken, k.quarantine("numbers", "d")]
    return str(state.call("ledger_lease", where, args))


def report(state: JobState, who: Identity, run: Run, *sums: Any, have: int = 1, step: Any = 3, batch: int = 0, old: int = -1) -> int:
    """One report."""
    k, keys = state.keys, state.keys.ledger("numbers", 0, run.id)
    args = [f"{who.state_id} {run.id}", *seat(who, run)[2:], have, step, 25, batch, "7:0-25", old, KEEP_MS, *sums]
    return int(state.call("ledger_report", [k.roster, keys.ledger, keys.done], args))


def quarantine(state: JobState, who: Identity, run: Run, shard: int, fence: int) -> int:
    """One shard cannot be read."""
    k = state.keys
    keys = [k.meta, k.roster, k.ledger("numbers", 0, run.id).ledger, k.quarantine("numbers", "d"), k.events]
    return int(state.call("ledger_quarantine", keys, [*seat(who, run), "numbers", shard, fence, "part-0.jsonl[0:5]", "not JSON"]))


def opened(state: JobState, *workers: str, start: Dynamic | None = None) -> tuple[list[Identity], Run]:
    """A run with a ledger."""
    who, run = formed(state, *workers)
    open_ledger(state, who[0], run, start)
    return who, run


def fields(state: JobState, run: Run) -> dict[str, str]:
    found: dict[str, str] = state.redis.hgetall(state.keys.ledger("numbers", 0, run.id).ledger)
    return found


def test_nothing_is_leased_before_the_base_is_set(job_state: JobState) -> None:
    """Given a run without a ledger, when a rank leases or reports, then it is refused."""
    (a,), run = formed(job_state, "a")
    with pytest.raises(LedgerUnset):
        lease(job_state, a, run, 1)
    with pytest.raises(LedgerUnset):
        report(job_state, a, run)


def test_the_base_is_set_once_and_all_ranks_mean_the_same(job_state: JobState) -> None:
    """Given a base, when another rank sets the same, nothing happens; another one is refused, naming what differs."""
    (_, b), run = opened(job_state, "a", "b", start=base(((0, 3),)))
    assert open_ledger(job_state, b, run, base(((0, 3),))) == "same"
    with pytest.raises(DataConflict, match="consumption before this run"):
        open_ledger(job_state, b, run, base(((0, 4),)))
    with pytest.raises(DataConflict, match="seed: 0, here it is 9"):
        open_ledger(job_state, b, run, base(((0, 3),), seed=9))
    assert job_state.redis.hget(job_state.keys.run(run.id), "data") == "1"


def test_candidates_come_first_and_then_any_that_is_free(job_state: JobState) -> None:
    """Given a base of four shards, when ranks lease, then candidates that are free come first, in their order, and others if asked."""
    (a, b), run = opened(job_state, "a", "b", start=base(((0, 4),)))
    assert lease(job_state, a, run, 9, 2, 5, 6, want=2) == "0|9:1 5:2|"
    assert lease(job_state, b, run, 9, 5) == "0||"
    assert lease(job_state, b, run, 9, want=2, start=0, number=2) == "0|4:3 6:4|"
    assert lease(job_state, a, run, want=5, start=1, known=2, number=2) == "0|8:5 10:6 7:7|"
    assert fields(job_state, run)["lease/9"] == f"a {a.incarnation} 1"


def test_a_rank_is_dry_when_nothing_is_free_and_it_knows_all_that_it_was_given(job_state: JobState) -> None:
    """Given no free shard, when a rank asks that missed an answer, then it is not dry; once it knows, it is, and so the epoch ends."""
    (a, b), run = opened(job_state, "a", "b", start=base(((0, 9),)))
    lease(job_state, a, run, want=5, start=0, have=0)
    assert Leased.parse(lease(job_state, a, run, start=0, have=3, number=2)).dry is False
    assert Leased.parse(lease(job_state, a, run, start=0, have=3, known=2, number=3)).dry is True
    assert [fields(job_state, run)[":most"], fields(job_state, run)[":dry"]] == ["3", "1"]
    for number in (1, 2):
        assert Leased.parse(lease(job_state, b, run, start=0, have=1, number=number)).dry is True
    assert [fields(job_state, run)[":most"], fields(job_state, run)[":dry"]] == ["3", "2"]


def test_a_repeated_lease_answers_what_the_first_did(job_state: JobState) -> None:
    """Given a lease whose answer was lost, when it is sent again, then the same shards are its answer, and no more are taken."""
    (a,), run = opened(job_state, "a")
    first = lease(job_state, a, run, 3, want=2, start=0)
    assert lease(job_state, a, run, 3, want=2, start=0) == first
    assert fields(job_state, run)[":fence"] == "2"


def test_a_number_that_an_ended_run_used_up_is_not_answered_from_it(job_state: JobState) -> None:
    """Given a lease that took effect before its run ended unnoticed, when its number comes again in the next run, it is a new lease."""
    (a, b), run = opened(job_state, "a", "b")
    assert lease(job_state, a, run, 3) == "0|3:1|"
    leave(job_state, b)
    with pytest.raises(RosterChanged):
        lease(job_state, a, run, 3)
    arrive(job_state, a, low=1, high=1, number=2, after=run.id)
    following = read_run(job_state, "0002-test", worker_id="a")
    open_ledger(job_state, a, following)
    assert lease(job_state, a, following, 5, want=1) == "0|5:1|"


def test_a_redis_that_lost_a_lease_is_found_out(job_state: JobState) -> None:
    """Given acknowledged leases that Redis forgot, when the next comes, then its number tells."""
    (a,), run = opened(job_state, "a")
    lease(job_state, a, run, 1)
    lease(job_state, a, run, 2, number=2)
    job_state.redis.hdel(job_state.keys.fences, "a/loader")
    with pytest.raises(StateLost):
        lease(job_state, a, run, 3, number=3)


def test_reports_count_only_under_the_lease_that_stands(job_state: JobState) -> None:
    """Given a lease, when ranges come under its fence they count; under another, or by another rank, they change nothing."""
    (a, b), run = opened(job_state, "a", "b")
    lease(job_state, a, run, 7, want=1)
    assert report(job_state, a, run, 7, 1, "0-25", have=4) == 1
    assert fields(job_state, run)["part/7"] == "0-25"
    assert report(job_state, a, run, 7, 2, "0-50") == 0
    assert report(job_state, b, run, 7, 1, "") == 0
    assert fields(job_state, run)["part/7"] == "0-25"
    assert report(job_state, a, run, 7, 1, "", batch=1, old=0) == 1
    held = fields(job_state, run)
    assert "part/7" not in held and "lease/7" not in held and "out/0/0" not in held
    assert held["out/0/1"] == "7:0-25" and held["have/0"] == "4" and held["step/0"] == "3"
    assert job_state.redis.getbit(job_state.keys.ledger("numbers", 0, run.id).done, 7) == 1


def test_a_shard_in_quarantine_is_nobodys(job_state: JobState) -> None:
    """Given a shard that its holder cannot read, when others ask for it, then they are told, and it is on record with the error."""
    (a, b), run = opened(job_state, "a", "b", start=base(((0, 9),)))
    lease(job_state, a, run, 9)
    assert quarantine(job_state, b, run, 9, 1) == 0
    assert quarantine(job_state, a, run, 9, 1) == 1
    assert quarantine(job_state, a, run, 9, 1) == 1
    assert job_state.redis.hgetall(job_state.keys.quarantine("numbers", "d")) == {"9": "not JSON"}
    job_state.redis.setbit(job_state.keys.ledger("numbers", 0, run.id).taken, 9, 0)  # as in the next epoch
    assert lease(job_state, b, run, 9, want=2, start=0) == "0|10:2|9"
    events = [e for _, e in job_state.redis.xrange(job_state.keys.events) if e["event"] == "shard_quarantined"]
    assert [e["reason"] for e in events] == ["not JSON"]


def release(state: JobState, *shards: int) -> str:
    """A person lets shards out of quarantine."""
    k = state.keys
    return str(state.call("ledger_release", [k.quarantine("numbers", "d"), k.events], ["numbers", " ".join(map(str, shards))]))


def test_a_shard_that_was_let_go_is_leased_in_the_next_ledger(job_state: JobState) -> None:
    """Given a shard in quarantine, when a person lets it and another go, then it is on record once, and leased once it is free."""
    (a,), run = opened(job_state, "a", start=base(((0, 9),)))
    lease(job_state, a, run, 9)
    quarantine(job_state, a, run, 9, 1)
    assert [release(job_state, 9, 3), release(job_state, 9, 3)] == ["9", ""]
    assert job_state.redis.exists(job_state.keys.quarantine("numbers", "d")) == 0
    job_state.redis.setbit(job_state.keys.ledger("numbers", 0, run.id).taken, 9, 0)  # as in the next epoch
    assert lease(job_state, a, run, 9, known=1, number=2) == "0|9:2|"
    events = [e for _, e in job_state.redis.xrange(job_state.keys.events) if e["event"] == "shards_released"]
    assert events == [{"event": "shards_released", "dataset": "numbers", "shards": "9"}]


def test_nothing_of_an_ended_run_takes_effect(job_state: JobState) -> None:
    """Given a departure, when the others lease, report or quarantine under the run that ended, then they are refused."""
    (a, b), run = opened(job_state, "a", "b")
    lease(job_state, a, run, 3)
    leave(job_state, b)
    before = fields(job_state, run)
    for call in (
        lambda: lease(job_state, a, run, 4, number=2),
        lambda: report(job_state, a, run, 3, 1, ""),
        lambda: quarantine(job_state, a, run, 3, 1),
        lambda: open_ledger(job_state, a, run),
    ):
        with pytest.raises(RosterChanged):
            call()
    assert fields(job_state, run) == before


def test_another_incarnation_is_refused(job_state: JobState) -> None:
    """Given a member whose place was taken in the same run's record, when it leases, then it is stale."""
    (a,), run = opened(job_state, "a")
    zombie = Identity(state_id=a.state_id, worker_id="a", incarnation="other", host="h", pid=1)
    with pytest.raises(StaleIncarnation):
        lease(job_state, zombie, run, 1)
