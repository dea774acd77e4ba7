"""Journals of runs that the job left behind go with their last checkpoint; those of the surviving lineage stay for good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dtr.checkpoint.keeping import pins
from dtr.checkpoint.keeping.collect import Collected, collect
from dtr.checkpoint.lineage import Lineage, Link, Segment
from dtr.checkpoint.survey import record_key
from dtr.config import Settings
from dtr.datasets.timemachine.journal import journal_key
from dtr.datasets.timemachine.retiring import forsaken
from dtr.state.job import JobState
from dtr.store import Store, open_store
from tests.ranks import Job, running
from tests.uploading import uploading

LINKS = {
    "a": Link(run="a", created_at_ms=1),
    "b": Link(run="b", parent_run="a", parent_step=1, created_at_ms=2),
    "c": Link(run="c", parent_run="b", parent_step=5, created_at_ms=3),
    "d": Link(run="d", parent_run="a", parent_step=1, created_at_ms=4),
}
LINEAGE = Lineage(segments=(Segment(run="d", last=None), Segment(run="a", last=1)))
JOURNALS = {("a", 1), ("a", 4), ("b", 5), ("c", 8), ("d", 9)}


@pytest.mark.parametrize(
    ("left", "gone"),
    [
        ({("b", 5): True, ("c", 8): True, ("a", 4): True}, {("b", 5), ("c", 8)}),
        ({("b", 5): True, ("c", 8): False}, set()),  # what stands of c came through b
        ({("b", 5): False, ("c", 8): True}, {("c", 8)}),
        ({("b", 5): True}, set()),  # of c it is not decided yet
        ({}, set()),
    ],
)
def test_what_may_go_is_off_every_line_that_leads_to_a_commit(left: dict[tuple[str, int], bool], gone: set[tuple[str, int]]) -> None:
    """d goes on from a; b and then c were left behind."""
    assert forsaken(JOURNALS, LINEAGE, LINKS, left) == gone


def test_a_run_that_nobody_has_a_record_of_keeps_its_journals() -> None:
    """And so does the newest one by the store, though Redis has not heard of it."""
    links = {**LINKS, "e": Link(run="e", parent_run="b", parent_step=5, created_at_ms=5)}
    every = {("b", 5): True, ("c", 8): True, ("x", 1): True}
    assert forsaken({*JOURNALS, ("x", 1)}, LINEAGE, links, every) == {("c", 8)}


@pytest.fixture
def here(settings: Settings) -> Settings:
    """The newest commit is kept, and readers get no grace."""
    return replace(settings, keep_last=1, reader_grace_s=0.0)


@pytest.fixture
def state(here: Settings) -> Iterator[JobState]:
    made = JobState(here.redis_url, here.job)
    yield made
    made.close()


def trained(job: Job, store: Store, *steps: int) -> str:
    """Commits with their journals; the run."""
    run = job.ranks[0].session.run.id
    for step in steps:
        job.commit(lambda _: b"x", step)
        store.put(journal_key(run, step), b"a journal", if_absent=True)
    return run


def test_journals_of_what_was_left_behind_go_with_its_last_checkpoint(here: Settings, tmp_path: Path, state: JobState) -> None:
    """b went on from a and was left; c does so too. A pin keeps b's step and journals; without it they go. a's stay, though retired."""
    folder = tmp_path / "store"
    store = open_store(folder).child(here.job)

    def journals() -> set[str]:
        return {run for run in (a, b, c) if list(store.list(f"journal/{run}"))}

    with uploading(replace(here, keep_last=0)):
        with running(replace(here, keep_last=0), folder, 1) as job:
            a = trained(job, store, 0, 1)
        with running(replace(here, keep_last=0), folder, 1) as job:
            job.restore(step=1)
            b = trained(job, store, 4, 5)
            pins.pin(state, store, b, 5)
        with running(here, folder, 1) as job:
            job.restore(step=1)
            c = trained(job, store, 7, 8)
            assert collect(store, state, dry_run=True, all_chunks=True).journals == 0
            for _ in range(2):
                collect(store, state, all_chunks=True)
            assert journals() == {a, b, c}
            pins.unpin(state, store, b, 5)
            broken = store.get(record_key(b))
            store.put(record_key(a), b"{")
            store.put(record_key(b), b"{")  # by what its tombstones tell it may be the newest
            for _ in range(2):
                collect(store, state, all_chunks=True)
            store.put(record_key(b), broken)
            assert collect(store, state, dry_run=True, all_chunks=True).journals == 2
            assert journals() == {a, b, c}
            assert collect(store, state, all_chunks=True).journals == 2
            assert journals() == {a, c}
            assert collect(store, state, all_chunks=True).journals == 0
        with running(here, folder, 1):  # it has not fixed what it goes on from
            store.put(journal_key(b, 4), b"a journal")
            assert collect(store, state, all_chunks=True) == Collected()
            assert journals() == {a, b, c}
