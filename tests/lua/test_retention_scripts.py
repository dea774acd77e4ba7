"""The scripts of retention: what is refused, and what a pin and a retirement do to each other."""

from __future__ import annotations

from typing import Any

import pytest

from dtr.membership import Identity
from dtr.runs import Run
from dtr.state.job import JobState
from tests.lua.checkpoints import events
from tests.lua.jobs import formed
from tests.lua.test_restore_scripts import base, offer


def retire(state: JobState, who: Identity, run: Run, name: str, *, state_id: str = "") -> list[str]:
    """One question of a collector; what Redis answered."""
    k = state.keys
    at, _, step = name.rpartition("/")
    answer: list[str] = state.call(
        "retention_retire",
        [k.meta, k.run(run.id), k.restore(run.id), k.ckpt(at, int(step)), k.events],
        [state_id or who.state_id, run.id, at, step, "retention"],
    )
    return answer


def pin(state: JobState, name: str, note: str = "-", *, spare: bool = False) -> str:
    """Pin, as ``dtr.checkpoint.keeping.pins`` does."""
    run, _, step = name.rpartition("/")
    return str(state.call("retention_pin", [state.keys.ckpt(run, int(step))], [note, int(spare)]))


def unpin(state: JobState, name: str) -> int:
    run, _, step = name.rpartition("/")
    return int(state.call("retention_unpin", [state.keys.ckpt(run, int(step))], []))


def due(state: JobState, token: str, interval_ms: int) -> int:
    return int(state.call("retention_due", [state.keys.retention], [token, interval_ms]))


def committed(state: JobState, *names: str, word: str = "COMMITTED") -> None:
    """Checkpoints in the index."""
    for name in names:
        run, _, step = name.rpartition("/")
        state.redis.hset(state.keys.ckpt(run, int(step)), mapping={"state": word})
        state.redis.zadd(state.keys.ckpts, {name: int(step)})


def settled(state: JobState, *names: str) -> tuple[Identity, Run]:
    """A run of one that continues 0000-o/2, and these commits."""
    (who,), run = formed(state, "a")
    committed(state, "0000-o/2", *names)
    base(state, who, run, "CUT", "0000-o/2", "0000-o", 2)
    base(state, who, run, "SET", "0000-o/2")
    return who, run


def test_the_base_and_the_newest_stay(job_state: JobState) -> None:
    """Retirement is refused for what a restart would need, and says why."""
    (a,), run = formed(job_state, "a")
    committed(job_state, "0000-o/1", "0000-o/2", f"{run.id}/9")
    assert retire(job_state, a, run, "0000-o/1") == ["KEPT", f"run {run.id} has not yet fixed what it continues"]
    base(job_state, a, run, "CUT", "0000-o/2", "0000-o", 2)
    base(job_state, a, run, "SET", "0000-o/2")
    job_state.redis.hset(job_state.keys.meta, "latest", f"{run.id}/9")
    found = [retire(job_state, a, run, name) for name in ("0000-o/1", "0000-o/2", f"{run.id}/9")]
    assert found == [["RETIRED"], ["KEPT", f"run {run.id} continues it"], ["KEPT", "it is the newest commit"]]
    assert retire(job_state, a, run, "0000-o/1") == ["RETIRED"], "asked again, it stays retired"
    assert events(job_state).count("ckpt_retired") == 1


def test_what_is_being_restored_stays(job_state: JobState) -> None:
    """A checkpoint that the ranks have agreed upon is not retired under their hands."""
    (a,), run = formed(job_state, "a")
    committed(job_state, "0000-o/1")
    offer(job_state, a, run, "0000-o/1")
    job_state.redis.hset(job_state.keys.run(run.id), "base_state", "SET")
    job_state.redis.hset(job_state.keys.run(run.id), mapping={"base_run": "", "base_step": ""})
    assert retire(job_state, a, run, "0000-o/1") == ["KEPT", f"run {run.id} restores it"]


@pytest.mark.parametrize("change", ["another state", "recovering", "a newer run"])
def test_a_collector_that_slept_is_refused(job_state: JobState, change: str) -> None:
    """Redis was emptied and filled, or another run formed, since the caller looked: nothing goes by what it saw then."""
    a, run = settled(job_state, "0000-o/1")
    keys = job_state.keys
    if change == "a newer run":
        job_state.redis.hset(keys.meta, "last_run", "0009-x")
    elif change == "recovering":
        job_state.redis.hset(keys.meta, "phase", "RECOVERING")
    answer = retire(job_state, a, run, "0000-o/1", state_id="f" * 16 if change == "another state" else "")
    assert answer[0] == "KEPT"
    assert job_state.redis.hget(keys.ckpt("0000-o", 1), "retired_at") is None


@pytest.mark.parametrize("word", ["WRITING", "SEALED", "ABORTING", "ABORTED", ""])
def test_only_commits_are_retired_and_pinned(job_state: JobState, word: str) -> None:
    """Whatever is under way, aborted or unknown is nobody's to keep or to retire."""
    a, run = settled(job_state)
    if word:
        committed(job_state, "0000-o/1", word=word)
    assert retire(job_state, a, run, "0000-o/1") == ["KEPT", "it is no commit that Redis knows"]
    assert pin(job_state, "0000-o/1") == word
    assert job_state.redis.hget(job_state.keys.ckpt("0000-o", 1), "pinned") is None


def test_a_pin_and_a_retirement_exclude_each_other(job_state: JobState) -> None:
    """Whichever is first wins; only who saw both the pin and the manifest in the store takes a retirement back."""
    a, run = settled(job_state, "0000-o/1", "0000-o/3")
    assert pin(job_state, "0000-o/1", "the best one") == "PINNED"
    assert retire(job_state, a, run, "0000-o/1") == ["KEPT", "it is pinned"]
    assert [unpin(job_state, "0000-o/1"), unpin(job_state, "0000-o/1")] == [1, 0]
    assert retire(job_state, a, run, "0000-o/1") == ["RETIRED"]
    assert pin(job_state, "0000-o/1") == "RETIRED"
    assert pin(job_state, "0000-o/1", spare=True) == "PINNED"
    assert retire(job_state, a, run, "0000-o/1")[0] == "KEPT"


def test_only_what_is_retired_or_aborted_is_forgotten(job_state: JobState) -> None:
    """A commit in use never leaves the index."""
    formed(job_state, "a")
    keys = job_state.keys
    committed(job_state, "0000-o/1")
    forget: list[Any] = [keys.ckpts, keys.ckpt("0000-o", 1), keys.parts("0000-o", 1)]
    assert job_state.call("retention_forget", forget, ["0000-o/1"]) == 0
    job_state.redis.hset(keys.ckpt("0000-o", 1), "retired_at", 1)
    assert job_state.call("retention_forget", forget, ["0000-o/1"]) == 1
    assert job_state.redis.exists(*forget) == 0


def test_one_collector_an_interval(job_state: JobState) -> None:
    """The first gets the turn, again if its reply was lost; others wait for the interval, and a clock that went back stops nobody."""
    assert [due(job_state, token, 60_000) for token in ("a", "a", "b")] == [1, 1, 0]
    assert due(job_state, "c", 0) == 1
    job_state.redis.hset(job_state.keys.retention, "collected_at", job_state.server_now_ms() + 10**9)
    assert due(job_state, "d", 60_000) == 1
