"""A placement is claimed, computed by one member and installed by compare-and-set: each rule, on every engine."""

from __future__ import annotations

from typing import Any

import pytest

from dtr.errors import RosterChanged, StaleIncarnation, StateLost
from dtr.membership import Identity
from dtr.runs import Run
from dtr.state.job import JobState
from tests.lua.jobs import formed, leave

LEASE_MS = 60_000


def fence(who: Identity, run: Run) -> list[Any]:
    return [who.state_id, run.id, who.worker_id, run.roster[who.worker_id].rank, who.incarnation]


def claim(
    state: JobState, who: Identity, run: Run, *, generation: int = 5, version: int = 1, asked: str = "a", lease_ms: int = LEASE_MS
) -> list[Any]:
    """One call of placement_claim."""
    k = state.keys
    keys = [k.meta, k.roster, k.placement("d"), k.placement("d", generation)]
    answer: list[Any] = state.call("placement_claim", keys, [*fence(who, run), generation, version, "members", asked, lease_ms])
    return answer


def install(
    state: JobState, who: Identity, run: Run, *, parent: str = "", grandparent: str = "", generation: int = 5, version: int = 1,
    shards: dict[str, str] | None = None,
) -> str:  # fmt: skip
    """One call of placement_install."""
    k = state.keys
    keys = [k.meta, k.roster, k.placement("d"), k.placement("d", generation), k.placement("d", int(grandparent or generation)), k.events]
    fields = [text for pair in (shards or {"a": "0-1", "b": "2"}).items() for text in pair]
    args = [*fence(who, run), "d", parent, grandparent, generation, version, "members", 3, *fields]
    return str(state.call("placement_install", keys, args))


def test_one_member_computes_and_the_others_wait(job_state: JobState) -> None:
    """Given no placement, when two ask, then the first computes, the second waits, and both get it once it is installed."""
    (a, b), run = formed(job_state, "a", "b")
    assert claim(job_state, a, run) == ["compute", "", "", ""]
    word, age_ms = claim(job_state, b, run)
    assert word == "wait"
    assert 0 <= age_ms < LEASE_MS
    assert install(job_state, a, run) == "installed"
    assert claim(job_state, a, run) == ["installed", "0-1"]
    assert claim(job_state, b, run, asked="b") == ["installed", "2"]
    assert job_state.redis.hgetall(job_state.keys.placement("d")) == {"generation": "5", "version": "1", "members": "members", "parent": ""}


def test_a_claim_is_kept_by_who_holds_it_and_passes_on_after_its_lease(job_state: JobState) -> None:
    """Given a claim, when its holder asks again it computes; when the lease is over, another does."""
    (a, b), run = formed(job_state, "a", "b")
    claim(job_state, a, run)
    assert claim(job_state, a, run)[0] == "compute"
    assert claim(job_state, b, run)[0] == "wait"
    job_state.redis.hset(job_state.keys.placement("d"), "computing_at", "1")
    assert claim(job_state, b, run)[0] == "compute"
    assert claim(job_state, a, run)[0] == "wait"


def test_a_claim_for_another_placement_hinders_nobody(job_state: JobState) -> None:
    """Given a claim of an earlier generation or version, when the present one is asked for, then it is computed at once."""
    (a, b), run = formed(job_state, "a", "b")
    claim(job_state, a, run, generation=4)
    assert claim(job_state, b, run, generation=5)[0] == "compute"
    assert claim(job_state, a, run, generation=5, version=2)[0] == "compute"


def test_the_second_of_two_that_computed_changes_nothing(job_state: JobState) -> None:
    """Given an installed placement, when one that was computed beside it comes, then the installed one stays, for all."""
    (a, b), run = formed(job_state, "a", "b")
    install(job_state, a, run)
    assert install(job_state, b, run, shards={"a": "2", "b": "0-1"}) == "installed"
    assert job_state.redis.hgetall(job_state.keys.placement("d", 5)) == {"a": "0-1", "b": "2"}
    assert job_state.redis.xlen(job_state.keys.events) == len([e for e in events(job_state) if e != "placed"]) + 1


def events(state: JobState) -> list[str]:
    return [fields["event"] for _, fields in state.redis.xrange(state.keys.events)]


def test_a_placement_whose_parent_is_not_installed_is_refused(job_state: JobState) -> None:
    """Given generation 5, when one computed from nothing or from another generation comes, then it must be computed again."""
    (a, _), run = formed(job_state, "a", "b")
    install(job_state, a, run)
    assert install(job_state, a, run, generation=6) == "changed"
    assert install(job_state, a, run, generation=6, parent="4") == "changed"
    assert install(job_state, a, run, generation=6, parent="5", grandparent="3") == "changed"
    assert job_state.redis.exists(job_state.keys.placement("d", 6)) == 0
    assert claim(job_state, a, run, generation=6) == ["compute", "5", "1", ""]


def test_two_placements_are_kept(job_state: JobState) -> None:
    """Given three installations, then the last and its parent are there and the first is gone."""
    (a, _), run = formed(job_state, "a", "b")
    install(job_state, a, run, generation=5)
    install(job_state, a, run, generation=6, parent="5")
    assert install(job_state, a, run, generation=9, parent="6", grandparent="5") == "installed"
    exists = [generation for generation in range(10) if job_state.redis.exists(job_state.keys.placement("d", generation))]
    assert exists == [6, 9]
    assert job_state.redis.hget(job_state.keys.placement("d"), "parent") == "6"


def test_a_new_version_replaces_the_placement_of_its_generation(job_state: JobState) -> None:
    """Given a placement of version 1, when version 2 is placed in the same run, then it takes its place and the parent stays."""
    (a, _), run = formed(job_state, "a", "b")
    install(job_state, a, run, generation=5)
    install(job_state, a, run, generation=6, parent="5")
    assert claim(job_state, a, run, generation=6, version=2) == ["compute", "6", "1", "5"]
    assert install(job_state, a, run, generation=6, version=2, parent="6", grandparent="5", shards={"a": "7"}) == "installed"
    assert job_state.redis.hgetall(job_state.keys.placement("d", 6)) == {"a": "7"}
    assert job_state.redis.exists(job_state.keys.placement("d", 5)) == 1
    assert job_state.redis.hget(job_state.keys.placement("d"), "parent") == "5"


def test_a_placement_that_lost_an_entry_is_computed_again(job_state: JobState) -> None:
    """Given an installed placement without the asked worker, when it is asked for, then it is computed and written whole."""
    (a, _), run = formed(job_state, "a", "b")
    install(job_state, a, run)
    job_state.redis.hdel(job_state.keys.placement("d", 5), "a")
    assert claim(job_state, a, run) == ["compute", "5", "1", ""]
    assert install(job_state, a, run, parent="5") == "installed"
    assert claim(job_state, a, run) == ["installed", "0-1"]


def test_a_worker_without_shards_is_no_missing_worker(job_state: JobState) -> None:
    """Given more workers than shards, then an empty entry is an answer."""
    (a, _), run = formed(job_state, "a", "b")
    install(job_state, a, run, shards={"a": "0", "b": ""})
    assert claim(job_state, a, run, asked="b") == ["installed", ""]


def test_a_thousand_workers_are_installed_whole(job_state: JobState) -> None:
    """More fields than one unpack may hold."""
    (a, _), run = formed(job_state, "a", "b")
    shards = {f"worker-{n}": f"{n}" for n in range(5_000)}
    assert install(job_state, a, run, shards=shards) == "installed"
    assert job_state.redis.hgetall(job_state.keys.placement("d", 5)) == shards


def test_nobody_outside_the_run_claims_or_installs(job_state: JobState) -> None:
    """Given a run that ended, an older incarnation, or another state, then both scripts refuse and write nothing."""
    (a, b), run = formed(job_state, "a", "b")
    stranger = Identity(state_id=a.state_id, worker_id="a", incarnation="other", host="h", pid=1)
    elsewhere = Identity(state_id="0" * 16, worker_id="a", incarnation=a.incarnation, host="h", pid=1)
    for call in (claim, install):
        with pytest.raises(StaleIncarnation):
            call(job_state, stranger, run)
        with pytest.raises(StateLost):
            call(job_state, elsewhere, run)
    leave(job_state, b)
    for call in (claim, install):
        with pytest.raises(RosterChanged, match="rank 1"):
            call(job_state, a, run)
    assert job_state.redis.exists(job_state.keys.placement("d"), job_state.keys.placement("d", 5)) == 0
