"""Where a restore reads: a slot that is still in memory, the cache folder, the store; into a state, in part, and what is tried no more."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.restoring import restore
from dtr.checkpoint.restoring.agreement import Agreement
from dtr.checkpoint.restoring.attempts import quarantined, tallies
from dtr.checkpoint.staging.slots import scan
from dtr.cli import main
from dtr.config import Settings
from dtr.errors import InvalidInput, RestoreFailed, RosterChanged, StateMismatch, WorldSizeMismatch
from dtr.state.job import JobState
from dtr.state.keys import uploader
from tests.ranks import Job, Rank, running
from tests.uploading import Uploads, uploading
from tests.waiting import eventually


def state_of(rank: int, step: int) -> dict[str, Any]:
    return {"model": {"w": np.full(50_000, step + rank / 8), "b": np.arange(rank + 3)}, "step": step, "rank": rank}


def blank(rank: int) -> dict[str, Any]:
    return {"model": {"w": np.zeros(50_000), "b": np.zeros(rank + 3, np.int64)}, "step": -1, "rank": -1}


def assert_is(found: Any, rank: int, step: int) -> None:
    assert (found["rank"], found["step"]) == (rank, step)
    assert_array_equal(found["model"]["w"], np.full(50_000, step + rank / 8))


def save(job: Job, *steps: int) -> None:
    for step in steps:
        job.commit(lambda rank, step=step: state_of(rank.rank, step), step)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def part(store: Path, rank: int, step: int) -> Path:
    (found,) = store.glob(f"*/runs/*/{step:012d}/part-{rank:05d}-*")
    return found


def survive(job: Job) -> None:
    """The last rank dies; the others form again, and it is back as a new process would be."""
    dead = job.ranks[-1]
    dead.session.close(reason="signal 9")
    dead.manager.close()
    eventually(lambda: all(isinstance(e, RosterChanged) for e in job.each(_check)[:-1]), what="the news at the survivors")
    job.ranks[-1] = job._make(f"w{len(job.ranks) - 1}", len(job.ranks) - 1, len(job.ranks), {})
    job.ranks[-1].session.start()
    job.each(_form_again)


def _check(rank: Rank) -> None:
    rank.session.check()


def _form_again(rank: Rank) -> None:
    rank.manager.end_run()
    rank.session.form()


class TestSlots:
    def test_survivors_go_back_at_the_speed_of_memory(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """After a death the others read their last commit from their own slots, the new process from the store."""
        with running(settings, store, 3) as job:
            save(job, 1, 2)
            survive(job)
            found = job.restore()
            assert [f.source for f in found] == ["slot", "slot", "store"]
            for rank, one in enumerate(found):
                assert_is(one.state, rank, 2)
                assert one.state["model"]["w"].flags.writeable

    def test_a_slot_that_holds_other_bytes_by_now_is_passed_over(
        self, settings: Settings, store: Path, uploads: Uploads, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A bit that flipped in memory: the store is read instead, and the log says why."""
        with running(settings, store, 2) as job:
            save(job, 1)
            for slot in scan(settings.staging):
                if slot.record is not None and slot.record.rank == 0:
                    flip(Path(slot.files.data))
            survive(job)
            with caplog.at_level(logging.WARNING):
                found = job.restore()
            assert [f.source for f in found] == ["store", "store"]
            assert_is(found[0].state, 0, 1)
            assert "slot" in caplog.text
            assert "checksum" in caplog.text

    def test_a_slot_stands_in_for_an_object_that_the_store_lost(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """The manifest says what the bytes must be, and memory has them: nothing is thrown away."""
        with running(settings, store, 2) as job:
            save(job, 1, 2)
            part(store, 0, 2).unlink()
            survive(job)
            found = job.restore()
            assert [f.step for f in found] == [2, 2]
            assert_is(found[0].state, 0, 2)

    def test_the_slot_is_free_again_afterwards(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """A restore holds the slot while it reads, and not longer: the next saves find their slots."""
        with running(replace(settings, slot_policy="fail"), store, 2) as job:
            save(job, 1)
            survive(job)
            assert job.restore()[0].source == "slot"
            save(job, 2, 3)


class TestSettling:
    def test_an_upload_that_goes_on_is_waited_for(self, settings: Settings, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As long as bytes move, the newest complete save is not thrown away for being slow."""
        monkeypatch.setattr(restore, "wait_until_settled", partial(restore.wait_until_settled, patience_s=1.5))
        with CheckpointManager(store, settings=settings) as old:
            handle = old.save_async(b"slow", 8)
            eventually(lambda: handle.state == "WRITING", what="the checkpoint in Redis")
            run = handle.run
        with running(settings, store, 1) as job:
            found: list[Any] = []
            restoring = threading.Thread(target=lambda: found.extend(job.restore()), daemon=True)
            restoring.start()
            state, host = job.ranks[0].session.state, job.ranks[0].session.host
            for _ in range(40):  # as an uploader would, for far longer than the patience
                state.redis.hset(uploader(host), "pid", 1)
                state.redis.hincrby(state.keys.parts(run, 8), "0/progress_bytes", 1)
                restoring.join(0.1)
            assert restoring.is_alive(), found
            state.redis.delete(uploader(host))
            with uploading(settings):
                restoring.join(30)
            assert [f.step for f in found] == [8]


class TestCache:
    @pytest.fixture
    def cached(self, settings: Settings, tmp_path: Path) -> Settings:
        return replace(settings, cache=str(tmp_path / "cache"))

    def test_the_second_restore_reads_it(self, cached: Settings, store: Path, uploads: Uploads) -> None:
        """The first fills it from the store; the next, of another process, needs the store's records alone."""
        with running(cached, store, 2) as job:
            save(job, 1)
        for source in ("store", "cache"):
            with CheckpointManager(store, settings=cached, rank=1, world_size=2) as reader:
                found = reader.restore()
                assert found is not None
                assert found.source == source
                assert_is(found.state, 1, 1)
        with CheckpointManager(store, settings=cached, rank=1, world_size=2) as reader:
            found = reader.restore(only="model/b", into=(given := blank(1)))
            assert found is not None
            assert (found.source, found.state is given, given["step"]) == ("cache", True, -1)
            assert_array_equal(given["model"]["b"], np.arange(4))

    def test_a_damaged_entry_is_dropped_and_filled_again(self, cached: Settings, store: Path, uploads: Uploads, tmp_path: Path) -> None:
        """One restore reads the store again, and the one after it the cache."""
        with running(cached, store, 1) as job:
            save(job, 1)
        sources = []
        for damaged in (False, True, False):
            if damaged:
                (entry,) = (tmp_path / "cache").glob("*.safetensors")
                flip(entry)
            with CheckpointManager(store, settings=cached) as reader:
                found = reader.restore()
                assert found is not None
                assert_is(found.state, 0, 1)
                sources.append(found.source)
        assert sources == ["store", "store", "cache"]

    def test_a_cache_that_cannot_be_used_changes_nothing_else(
        self, settings: Settings, store: Path, uploads: Uploads, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A file where the folder should be: the restore works, with a line in the log that names it."""
        (tmp_path / "file").write_text("no folder")
        with running(settings, store, 1) as job:
            save(job, 1)
        with CheckpointManager(store, settings=replace(settings, cache=str(tmp_path / "file"))) as reader, caplog.at_level(logging.WARNING):
            found = reader.restore()
            assert found is not None
            assert_is(found.state, 0, 1)
        assert str(tmp_path / "file") in caplog.text


class TestInto:
    def test_ranks_fill_what_they_have(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """Collectively: every rank's own arrays hold what it saved."""
        with running(settings, store, 2) as job:
            save(job, 1)
        with running(settings, store, 2) as job:
            given = [blank(0), blank(1)]
            arrays = [state["model"]["w"] for state in given]
            found = job.each(lambda rank: rank.manager.restore(into=given[rank.rank]))
            for rank in (0, 1):
                assert found[rank].state is given[rank]
                assert given[rank]["model"]["w"] is arrays[rank]
                assert_is(given[rank], rank, 1)

    def test_a_state_that_differs_is_told_and_no_older_checkpoint_taken(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """One rank's model was changed: it learns where, the other why; step 1, which would fit, is not used instead."""
        with running(settings, store, 2) as job:
            job.commit(lambda rank: {"w": np.zeros(3)}, 1)
            job.commit(lambda rank: {"w": np.zeros(5)}, 2)
        with running(settings, store, 2) as job:
            given = np.full(3, 7.0)
            errors = job.each(lambda rank: rank.manager.restore(into={"w": given} if rank.rank else None))
            assert [type(e) for e in errors] == [RestoreFailed, StateMismatch]
            assert "state['w'] has shape (3,), and (5,) was saved" in str(errors[1])
            assert "rank 1" in str(errors[0])
            assert (given == 7.0).all()
            assert tallies(job.ranks[0].session.state)[errors_run(errors[0]), 2].damaged == 0
            found = job.each(lambda rank: rank.manager.restore(into={"w": np.zeros(5)}))
            assert [f.step for f in found] == [2, 2]

    @pytest.mark.parametrize("given", ["/a/file", 3, np.zeros(3), b"bytes"])
    def test_what_cannot_be_filled_is_refused(self, settings: Settings, store: Path, given: Any) -> None:
        """A path, say: restore into a file is a mistake that is named."""
        with CheckpointManager(store, settings=settings) as manager, pytest.raises(InvalidInput, match="into must be a state"):
            manager.restore(into=given)

    def test_part_of_it(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """Only the model, for an evaluation; a path that is not there is an error for every rank."""
        with running(settings, store, 2) as job:
            save(job, 1)
        with running(settings, store, 2) as job:
            errors = job.each(lambda rank: rank.manager.restore(only="modell/*"))
            assert [type(e) for e in errors] == [InvalidInput, InvalidInput]
            assert "only selects nothing" in str(errors[0])
            found = job.each(lambda rank: rank.manager.restore(only=["model/w", "step"]))
            assert [(list(f.state), list(f.state["model"]), f.state["step"]) for f in found] == [(["model", "step"], ["w"], 1)] * 2

    @pytest.mark.parametrize("wrong", [{"only": "modell/*"}, {"into": {"w": 3}}])
    def test_who_looks_after_the_no_of_another(
        self, settings: Settings, store: Path, uploads: Uploads, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
    ) -> None:
        """Given ranks that ask for the same impossible thing, then both are told so, though one's no ended it before the other looked."""
        with running(settings, store, 2) as job:
            save(job, 1)
        with running(settings, store, 2) as job:
            vote_on = Agreement._vote_on
            monkeypatch.setattr(
                Agreement, "_vote_on",
                lambda self, answer: self._wait_for_news(answer) if self._run.rank else vote_on(self, answer),
            )  # fmt: skip
            for error in job.each(lambda rank: rank.manager.restore(**wrong)):
                assert isinstance(error, InvalidInput), error


class TestReplicatedInPart:
    def state(self, rank: int) -> dict[str, Any]:
        return {"optimizer": {"m": np.arange(90_000.0), "step": 7}, "rows": np.full(1000, float(rank))}

    @pytest.fixture
    def saved(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """Two ranks, which hold the optimizer alike."""
        with running(settings, store, 2) as job:
            handles = job.each(lambda rank: rank.manager.save_async(self.state(rank.rank), 1, replicated="optimizer/*"))
            for handle in handles:
                handle.durable.result(30)

    def test_the_same_ranks_get_all_of_it(self, settings: Settings, store: Path, saved: None) -> None:
        """Each its own rows, and the common tensors from both parts; into new memory and in place."""
        with running(settings, store, 2) as job:
            given = self.state(1)
            given["optimizer"]["m"][:], given["rows"][:] = -1, -1
            found = job.each(lambda rank: rank.manager.restore(into=given if rank.rank else None))
            assert found[1].state is given
            for rank in (0, 1):
                assert_array_equal(found[rank].state["rows"], np.full(1000, float(rank)))
                assert_array_equal(found[rank].state["optimizer"]["m"], np.arange(90_000.0))

    def test_other_ranks_are_told_what_fits_and_get_that(self, settings: Settings, store: Path, saved: None) -> None:
        """Three ranks cannot have the rows of two, and never silently something else; what is common they can."""
        with running(settings, store, 3) as job:
            errors = job.restore()
            assert [type(e) for e in errors] == [WorldSizeMismatch] * 3
            assert "rows" in str(errors[0])
            assert "world_size=2" in str(errors[0])
            found = job.each(lambda rank: rank.manager.restore(only="optimizer/*"))
            for one in found:
                assert list(one.state) == ["optimizer"]
                assert_array_equal(one.state["optimizer"]["m"], np.arange(90_000.0))


def errors_run(error: RestoreFailed) -> str:
    (name,) = (name for name in error.facts["reasons"] if name.endswith("/2"))
    return str(name.rpartition("/")[0])


class TestQuarantine:
    @pytest.fixture
    def stored(self, settings: Settings, store: Path, uploads: Uploads) -> Settings:
        """Two checkpoints; one that was tried twice is passed over."""
        with running(settings, store, 2) as job:
            save(job, 1, 2)
        return replace(settings, restore_attempts=2)

    def tried(self, settings: Settings, store: Path, step: int) -> None:
        """As two runs leave it whose ranks died while they read it."""
        (manifest,) = store.glob(f"*/runs/*/{step:012d}/manifest.json")
        with contextlib.closing(JobState(settings.redis_url, settings.job)) as state:
            state.redis.hset(state.keys.restores, f"{manifest.parts[-3]}/{step}/begun", 2)

    def test_what_nobody_could_restore_is_passed_over(self, stored: Settings, store: Path, caplog: pytest.LogCaptureFixture) -> None:
        """The next run takes the one before, with the reason in log and events; so does whoever only reads."""
        self.tried(stored, store, 2)
        with CheckpointManager(store, settings=stored, rank=1, world_size=2) as reader:
            found = reader.restore()
            assert found is not None
            assert found.step == 1
        with running(stored, store, 2) as job:
            assert [f.step for f in job.restore()] == [1, 1]
            state = job.ranks[0].session.state
            assert [f["step"] for _, f in state.redis.xrange(state.keys.events) if f["event"] == "ckpt_quarantined"] == ["2"]
        assert "tried 2 times and never restored, no rank said why" in caplog.text

    def test_it_is_tried_when_asked_for_and_a_success_clears_it(self, stored: Settings, store: Path) -> None:
        """By its step it is restored like any other, and from then on it is one."""
        self.tried(stored, store, 2)
        with running(stored, store, 2) as job:
            assert [f.step for f in job.restore(step=2)] == [2, 2]
            assert tallies(job.ranks[0].session.state) == {}

    def test_the_only_one_is_tried_all_the_same(self, stored: Settings, store: Path) -> None:
        """Nothing is gained by passing over what there is no other of."""
        self.tried(stored, store, 2)
        self.tried(stored, store, 1)
        with running(stored, store, 2) as job:
            assert [f.step for f in job.restore()] == [2, 2]

    def test_failed_restores_are_counted(self, stored: Settings, store: Path) -> None:
        """Both are damaged: every restore that says so counts for both, with the reason; 0 never passes one over."""
        for step in (1, 2):
            flip(part(store, 1, step))
        with running(stored, store, 2) as job:
            for count in (1, 2, 3):
                assert [type(e) for e in job.restore()] == [RestoreFailed] * 2
                counted = tallies(job.ranks[0].session.state)
                assert {step: (tally.begun, tally.damaged) for (_, step), tally in counted.items()} == {1: (count,) * 2, 2: (count,) * 2}
            assert all("rank 1" not in tally.reason and "checksum" in tally.reason for tally in counted.values())
            assert len(quarantined(counted, 3)) == 2
            assert quarantined(counted, 0) == {}


class TestPlan:
    @pytest.fixture
    def plan(self, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
        """Runs `dtr ckpt plan` as a person of this host would."""

        def call(settings: Settings, *options: str, code: int = 0) -> Any:
            monkeypatch.setenv("COLUMNS", "80")
            monkeypatch.setenv("DTR_STAGING", settings.staging)
            monkeypatch.setenv("DTR_RESTORE_ATTEMPTS", str(settings.restore_attempts))
            if settings.cache:
                monkeypatch.setenv("DTR_CACHE", settings.cache)
            got = main(["ckpt", "plan", "--url", settings.redis_url, "--job", settings.job, "--store", str(store), *options])
            out, err = capsys.readouterr()
            assert got == code, err
            assert max(map(len, out.splitlines()), default=0) <= 80 or "--json" in options
            return json.loads(out) if "--json" in options else out

        return call

    def test_says_what_a_restore_takes_from_where_and_why_not_the_others(
        self, settings: Settings, store: Path, uploads: Uploads, plan: Any
    ) -> None:
        """The plan is what the restore then does; a damaged object counts from the second restore on, a missing one at once."""
        with running(settings, store, 2) as job:
            save(job, 1, 2, 3)
            part(store, 1, 3).unlink()
            shutil.rmtree(settings.staging, ignore_errors=True)  # the uploader frees slots at the same time
            found = plan(settings, "--json")
            assert (found["choice"].rpartition("/")[2], found["world_size"], found["rank"]) == ("2", 2, None)
            assert [(c["step"], c["verdict"]) for c in found["checkpoints"]] == [(3, "rejected"), (2, "taken"), (1, "behind")]
            assert "rank 1: object" in found["checkpoints"][0]["reason"]
            assert found["checkpoints"][1]["where"] == {"store": 2}
        with running(settings, store, 2) as job:
            assert [f.step for f in job.restore()] == [2, 2]

    def test_as_one_rank_of_another_world(self, settings: Settings, store: Path, uploads: Uploads, plan: Any) -> None:
        """A world size that does not fit says what would, and exits 1."""
        with running(settings, store, 2) as job:
            save(job, 1)
        found = plan(settings, "--rank", "2", "--world-size", "3", "--json", code=1)
        assert "world_size=2" in found["reason"]
        assert found["choice"] == ""
        plan(settings, "--rank", "5", code=2)

    def test_shows_slots_cache_and_counts(self, settings: Settings, store: Path, uploads: Uploads, tmp_path: Path, plan: Any) -> None:
        """Memory first, then the cache; the number of failed restores beside a quarantined one."""
        settings = replace(settings, cache=str(tmp_path / "cache"), restore_attempts=1)
        with running(settings, store, 1) as job:
            save(job, 1, 2)
            assert plan(settings, "--json")["checkpoints"][0]["where"] == {"slot": 1}
            run = job.ranks[0].session.run.id
        with CheckpointManager(store, settings=settings) as reader:
            reader.restore()
        assert plan(settings, "--json")["checkpoints"][0]["where"] == {"cache": 1}
        shutil.rmtree(tmp_path / "cache")
        with contextlib.closing(JobState(settings.redis_url, settings.job)) as state:
            state.redis.hset(state.keys.restores, mapping={f"{run}/2/begun": 1, f"{run}/2/damaged": 1, f"{run}/2/reason": "a bit flip"})
        found = plan(settings, "--json")
        assert [(c["step"], c["verdict"], c["begun"], c["damaged"]) for c in found["checkpoints"]] == [
            (2, "rejected", 1, 1),
            (1, "taken", 0, 0),
        ]
        assert "because a bit flip" in " ".join(plan(settings).split())
        assert f"{run}/2 from store" in plan(settings, "--step", "2"), "asked for, it is tried"

    def test_nothing_there(self, settings: Settings, plan: Any) -> None:
        """An empty store, and one that nobody named."""
        state = JobState(settings.redis_url, settings.job)
        state.redis.hset(state.keys.meta, "schema", 1)
        assert "nothing: the lineage has no checkpoint" in plan(settings, code=1)
        assert "of step 4" in plan(settings, "--step", "4", code=1)
        state.redis.delete(state.keys.meta)
        state.close()
