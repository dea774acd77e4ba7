"""Where a loader begins: after a restore, whichever came first; in which version of its data set; and that a run never goes back."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtr.config import Settings
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.errors import DataConflict, DatasetChanged, InvalidInput
from tests.loading import loading, once_each, registered
from tests.uploading import uploading
from worker_agent import Agent

numbers = pytest.fixture(registered)
MODES = pytest.mark.parametrize("options", [{}, {"mode": "deterministic", "global_batch_size": 30}], ids=["dynamic", "deterministic"])


def register_again(settings: Settings, folder: Path) -> int:
    """What a trainer does when it starts; returns the version."""
    with closing(DatasetRegistry(settings.redis_url, job=settings.job)) as registry:
        return registry.register("numbers", path=folder, format="jsonl", shard_size=25, shuffle=True).version


def grow(settings: Settings, folder: Path) -> None:
    """A file with the ids 400 to 499 is added, as version 2."""
    (folder / "part-9.jsonl").write_text("".join(f'{{"id": {i}, "x": 0.0}}\n' for i in range(400, 500)))
    assert register_again(settings, folder) == 2


# --- a restore, and the loader --------------------------------------------------------------------------------------------


@MODES
def test_a_loader_made_before_the_restore_begins_where_it_says(settings: Settings, numbers: Path, options: dict[str, Any]) -> None:
    """Given a loader, made in a run that nobody knows to follow another, when the state is restored, then it goes on from there."""
    with loading(settings, 2, names="a") as job:
        job.train(5, **options)
        cut, seen = job.merged(), job.seen()
    with loading(settings, 2, names="b") as job:
        loaders = job.each(lambda rank: rank.loader(**options))
        job.restored(cut).train(**options)
        assert all(loader.exhausted for loader in loaders)
        assert once_each(seen + job.seen(), range(400))


def test_a_restore_after_the_first_batch_is_refused(settings: Settings, numbers: Path) -> None:
    """Given a batch that was handed out, when a state is restored, then that says what to do, and the loader goes on."""
    with loading(settings, 1, names="a") as job:
        job.train(5)
        cut = job.merged()
    with loading(settings, 1, names="b") as job:
        (rank,) = job.ranks
        rank.consume(next(rank.loader()))
        with pytest.raises(DataConflict, match=r"before the first batch .* call form\(\), then restore\(\)"):
            job.restored(cut)
        job.train()
        assert once_each(job.seen(), range(400))


def test_a_loader_that_cannot_go_on_from_what_is_restored_is_closed(settings: Settings, numbers: Path) -> None:
    """Given a loader of another mode, when a state is restored, then that is refused, and it gives nothing from another place."""
    with loading(settings, 1, names="a") as job:
        job.train(5)
        cut = job.merged()
    with loading(settings, 1, names="b") as job:
        (rank,) = job.ranks
        loader = rank.loader(mode="deterministic", global_batch_size=30)
        with pytest.raises(DataConflict, match="has mode dynamic"):
            job.restored(cut)
        with pytest.raises(DataConflict, match="was closed"):
            next(loader)
        job.train()
        assert sum(job.seen().values()) == 350


def test_a_run_goes_back_only_as_a_new_one(settings: Settings, numbers: Path, tmp_path: Path) -> None:
    """Given steps after a save, when the agent restores, then that is refused and its step stays; formed anew, each sample comes once."""
    stored = replace(settings, store=str(tmp_path / "store"))
    options: dict[str, Any] = {"job": stored.job, "staging": stored.staging, "store": stored.store, "ttl_s": 3.0, "beat_interval_s": 0.2}
    with uploading(stored), Agent("w0", stored.redis_url, 1, **options) as agent:
        agent.restore(fresh=True)
        assert agent.restore(fresh=True) is None  # nothing was taken yet
        seen: list[int] = []

        def train(steps: int | None) -> None:
            for batch in agent.loader("numbers", batch_size=20, columns=["id"]):
                seen.extend(map(int, batch["id"]))
                agent.step(batch)
                if steps is not None and agent.current_step == steps:
                    return

        train(3)
        agent.save_async({"seen": seen}, replicated=True).durable.result(60)
        train(7)
        with pytest.raises(DataConflict, match=r"call form\(\), then restore\(\)"):
            agent.restore()
        assert agent.current_step == 7
        read = agent.checkpoints.restore()
        assert read is not None and (read.step, agent.current_step) == (3, 7)
        found = agent.form().restore()
        assert found is not None and agent.current_step == 3
        seen = list(found.state["seen"])
        train(None)
        assert sorted(seen) == list(range(400))


def test_steps_without_data_do_not_go_back_either(settings: Settings, tmp_path: Path) -> None:
    """Given a trainer with a loader of its own, when it restores after a step, then that is refused: its step is never set back."""
    options: dict[str, Any] = {"job": settings.job, "staging": settings.staging, "store": str(tmp_path / "store"), "ttl_s": 3.0}
    with Agent("w0", settings.redis_url, 1, **options) as agent:
        agent.restore(fresh=True)
        agent.step()
        with pytest.raises(DataConflict, match="before the first step"):
            agent.restore(fresh=True)
        assert agent.current_step == 0


# --- a new version --------------------------------------------------------------------------------------------------------


@MODES
def test_a_new_version_is_taken_when_a_run_begins_at_an_epoch(settings: Settings, numbers: Path, options: dict[str, Any]) -> None:
    """Given a finished epoch and a file that was added since, when the next run goes on, then all its epochs have it."""
    with loading(settings, 2, names="a") as job:
        job.train(**options)
        cut = job.merged()
    grow(settings, numbers)
    with loading(settings, 3, names="b") as job:
        job.restored(cut).train(epochs=2, **options)
        assert once_each(job.seen(1), range(500))
        cut = job.merged()
        assert (cut["numbers"]["version"], job.seen(0)) == (2, {})
    with loading(settings, 2, names="c") as job:
        job.restored(cut).train(epochs=3, **options)
        assert once_each(job.seen(2), range(500))


@MODES
def test_a_new_version_is_taken_when_nothing_was_consumed(settings: Settings, numbers: Path, options: dict[str, Any]) -> None:
    """Given a save before the first step, and leases in which a skip was met, when a version was added, then it is loaded, once each."""
    with loading(settings, 1, names="a") as job:
        next(job.ranks[0].loader(**options))
        cut = job.merged()
    cut["numbers"]["notes"] = {"skipped": {"0": {"0": "3-5"}}}  # of shards as they are numbered in version 1
    (numbers / "part-0.jsonl").rename(numbers / "part-8.jsonl")
    grow(settings, numbers)
    with loading(settings, 2, names="b") as job:
        job.restored(cut).train(**options)
        assert once_each(job.seen(), range(500))
        assert not job.merged()["numbers"].get("notes")


@MODES
def test_an_epoch_goes_on_with_the_version_it_was_begun_with(settings: Settings, numbers: Path, options: dict[str, Any]) -> None:
    """Given a version that was added in mid-epoch, then the epoch has its own samples; the next run, at its end, takes the new one."""
    with loading(settings, 2, names="a") as job:
        job.train(5, **options)
        cut, seen = job.merged(), job.seen()
    grow(settings, numbers)
    with loading(settings, 3, names="b") as job:
        job.restored(cut).train(**options)
        assert once_each(seen + job.seen(), range(400))
        cut = job.merged()
    with loading(settings, 3, names="c") as job:
        job.restored(cut).train(epochs=2, **options)
        assert once_each(job.seen(1), range(500))


@MODES
def test_a_changed_file_in_mid_epoch_has_a_way_out(settings: Settings, numbers: Path, options: dict[str, Any]) -> None:
    """Given a file that was changed and registered again, then the error says how to go on, and what is dropped for it is on record."""
    with loading(settings, 2, names="a") as job:
        job.train(5, **options)
        cut, seen = job.merged(), job.seen()
    for file in numbers.iterdir():
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert register_again(settings, numbers) == 2
    with loading(settings, 2, names="b") as job, pytest.raises(DatasetChanged, match=r"version 2 is registered: .*'abandon_epoch'"):
        job.restored(cut).train(**options)
    with loading(settings, 3, names="c") as job:
        job.restored(cut).train(epochs=2, on_new_version="abandon_epoch", **options)
        assert once_each(job.seen(1), range(400)) and not job.seen(0)
        dropped = job.merged()["numbers"]["notes"]["dropped"]["0"]
    spans = [part.split("-") for text in dropped.values() for part in text.split(",")]
    assert sum(int(stop) - int(start) for start, stop in spans) == 400 - sum(seen.values())


def test_ranks_that_read_different_versions_do_not_train_on(settings: Settings, numbers: Path) -> None:
    """Given one rank that abandons the epoch for a version that the other had not seen, then one is refused, and nobody waits."""
    with loading(settings, 2, names="a") as job:
        job.train(5)
        cut = job.merged()
    with loading(settings, 2, names="b") as job:
        early, late = job.restored(cut).ranks
        loader = early.loader(on_new_version="abandon_epoch")
        next(loader)
        grow(settings, numbers)
        with pytest.raises(DataConflict, match="another version"):
            late.loader(on_new_version="abandon_epoch")


def test_ranks_that_begin_an_epoch_with_different_versions_do_not_train_on(settings: Settings, numbers: Path) -> None:
    """Given a version that is added between two ranks' looks at the registry, then the first one's holds, and the other is refused."""
    with loading(settings, 2, names="a") as job:
        job.train()
        cut = job.merged()
    with loading(settings, 2, names="b") as job:
        early, late = job.restored(cut).ranks
        assert next(early.loader(epochs=2)).version == 1
        grow(settings, numbers)
        with pytest.raises(DataConflict, match="another version: 1, here it is 2"):
            next(late.loader(epochs=2))


def test_what_to_do_with_a_new_version_is_checked(settings: Settings, numbers: Path) -> None:
    """One of two words."""
    with loading(settings, 1) as job, pytest.raises(InvalidInput, match="on_new_version must be"):
        job.ranks[0].loader(on_new_version="now")
