"""Data sets are staged and registered: each rule of the scripts, on every engine."""

from __future__ import annotations

from typing import Any

import pytest

from dtr.state.job import JobState


def register(state: JobState, digest: str, *, known: int, version: int, files: int = 1, extra: tuple[str, ...] = ()) -> list[Any]:
    """One call of dataset_register."""
    k = state.keys
    keys = [k.dataset("d"), k.dataset("d", version), k.dataset_files("d", digest), k.datasets, k.events]
    spec = ["version", version, "digest", digest, *extra]
    answer: list[Any] = state.call("dataset_register", keys, ["d", digest, known, version, files, *spec])
    return answer


def stage(state: JobState, digest: str, *facts: str) -> str:
    """One call of dataset_stage."""
    return str(state.call("dataset_stage", [state.keys.dataset_files("d", digest)], [60, *facts]))


def test_a_spec_is_registered_once_its_files_are_staged(job_state: JobState) -> None:
    """Given staged facts, when a new spec is registered, then it is current, kept under its version, listed and announced."""
    assert register(job_state, "x", known=0, version=1) == ["stage", "0"]
    assert stage(job_state, "x", "a.jsonl", "samples=1") == "staged"
    assert register(job_state, "x", known=0, version=1) == ["registered", "1"]
    k = job_state.keys
    assert job_state.redis.hgetall(k.dataset("d")) == {"version": "1", "digest": "x"}
    assert job_state.redis.hgetall(k.dataset("d", 1)) == {"version": "1", "digest": "x"}
    assert job_state.redis.hgetall(k.datasets) == {"d": "1"}
    assert job_state.redis.ttl(k.dataset_files("d", "x")) == -1
    assert [e["event"] for _, e in job_state.redis.xrange(k.events)] == ["dataset_registered"]


def test_staged_facts_expire_unless_they_are_registered(job_state: JobState) -> None:
    """Given facts that were staged, when nobody registers them, then they have a time to live."""
    stage(job_state, "x", "a.jsonl", "samples=1")
    assert 0 < job_state.redis.ttl(job_state.keys.dataset_files("d", "x")) <= 60


def test_a_late_stager_does_not_harm_what_is_registered(job_state: JobState) -> None:
    """Given a registered spec, when another process stages the same files, then the facts stay and get no time to live."""
    stage(job_state, "x", "a.jsonl", "samples=1")
    register(job_state, "x", known=0, version=1)
    assert stage(job_state, "x", "a.jsonl", "samples=2") == "kept"
    key = job_state.keys.dataset_files("d", "x")
    assert job_state.redis.ttl(key) == -1
    assert job_state.redis.hgetall(key) == {"a.jsonl": "samples=1"}


def test_registering_the_same_again_changes_nothing(job_state: JobState) -> None:
    """Given a registered spec, when it comes again under any assumption, then the answer is its version and nothing is written."""
    stage(job_state, "x", "a.jsonl", "samples=1")
    register(job_state, "x", known=0, version=1)
    assert register(job_state, "x", known=0, version=1) == ["same", "1"]
    assert register(job_state, "x", known=1, version=2) == ["same", "1"]
    assert job_state.redis.exists(job_state.keys.dataset("d", 2)) == 0
    assert job_state.redis.xlen(job_state.keys.events) == 1


def test_another_spec_is_the_next_version_and_the_earlier_one_is_kept(job_state: JobState) -> None:
    """Given version 1, when a changed spec is registered, then no field of the old one is left in the current one."""
    for digest in ("x", "y"):
        stage(job_state, digest, "a.jsonl", "samples=1")
    register(job_state, "x", known=0, version=1, extra=("dtype", "<u2"))
    assert register(job_state, "y", known=1, version=2) == ["registered", "2"]
    k = job_state.keys
    assert job_state.redis.hgetall(k.dataset("d")) == {"version": "2", "digest": "y"}
    assert job_state.redis.hget(k.dataset("d", 1), "dtype") == "<u2"
    assert job_state.redis.exists(k.dataset_files("d", "x")) == 1
    assert job_state.redis.hgetall(k.datasets) == {"d": "2"}


def test_a_caller_that_missed_a_version_tries_again(job_state: JobState) -> None:
    """Given version 1, when a caller that knows of none registers, then it is told, and nothing is written."""
    for digest in ("x", "y"):
        stage(job_state, digest, "a.jsonl", "samples=1")
    register(job_state, "x", known=0, version=1)
    assert register(job_state, "y", known=0, version=1) == ["again", "1"]
    assert job_state.redis.hget(job_state.keys.dataset("d", 1), "digest") == "x"


@pytest.mark.parametrize("staged", [1, 3])
def test_facts_must_be_those_of_all_files(job_state: JobState, staged: int) -> None:
    """Given facts of fewer or more files than the spec has, when it is registered, then they must be staged first."""
    stage(job_state, "x", *(text for n in range(staged) for text in (f"{n}.jsonl", "samples=1")))
    assert register(job_state, "x", known=0, version=1, files=2) == ["stage", "0"]
    assert job_state.redis.exists(job_state.keys.dataset("d")) == 0
