"""Readers of a job that is alive: it commits and retires while they look at Redis and the store, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dtr.checkpoint.keeping.collect import collect
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.restoring import restore as restoring
from dtr.checkpoint.survey import Holdings, survey
from dtr.config import Settings
from dtr.store import Store, open_store
from tests.ranks import Job, running
from tests.uploading import uploading


@pytest.fixture
def here(settings: Settings) -> Settings:
    """The newest commit alone is kept, and readers get no grace."""
    return replace(settings, keep_last=1, reader_grace_s=0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def training(here: Settings, folder: Path) -> Iterator[Job]:
    """A run of one rank, with an uploader, that has committed step 0."""
    with uploading(here), running(here, folder, 1) as made:
        made.commit(lambda _: b"0", 0)
        yield made


def overtake(monkeypatch: pytest.MonkeyPatch, job: Job, steps: list[int], *, retire: bool) -> None:
    """Each look at the store is followed by the commit of one of ``steps``, and with ``retire`` by the end of all before it."""
    store, left = open_store(job.url).child(job.settings.job), steps[::-1]

    def overtaken(looked_at: Store) -> Holdings:
        found = survey(looked_at)
        if left:
            step = left.pop()
            job.commit(lambda _: b"%d" % step, step)
            if retire:
                collect(store, job.ranks[0].session.state)
        return found

    monkeypatch.setattr(restoring, "survey", overtaken)


@pytest.mark.parametrize("fresh", [False, True])
def test_everything_seen_is_retired_meanwhile(
    here: Settings, folder: Path, training: Job, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    """That is no fresh start, and nothing is called lost: the reader looks again, and reads what is newest by then."""
    overtake(monkeypatch, training, [1, 2], retire=True)
    with CheckpointManager(folder, settings=here) as reader:
        found = reader.restore(fresh=fresh)
    assert found is not None
    assert (found.step, found.state) == (2, b"2")


def test_a_commit_between_two_looks_is_not_lost(
    here: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis knows it, and the listing of the store is older: what was listed is read, and no loss is reported."""
    kept = replace(here, keep_last=0)
    with uploading(kept), running(kept, folder, 1) as job:
        job.commit(lambda _: b"0", 0)
        overtake(monkeypatch, job, [1], retire=False)
        with CheckpointManager(folder, settings=kept) as reader:
            found = reader.restore()
        assert found is not None
        assert found.step == 0
    assert "holds no record" not in caplog.text


def test_nothing_there_is_found_out_at_once(here: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty store is listed twice, not until some limit."""
    looks = 0

    def counted(store: Store) -> Holdings:
        nonlocal looks
        looks += 1
        return survey(store)

    monkeypatch.setattr(restoring, "survey", counted)
    with CheckpointManager(folder, settings=here) as reader:
        assert reader.restore(fresh=True) is None
    assert looks == 2
