"""Replicated state and delta through the manager: real Redis, a real uploader, several ranks, files and S3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr.checkpoint.delta import chunks as chunk_format
from dtr.checkpoint.delta.collection import CONDEMNED
from dtr.checkpoint.delta.payoff import FIRST_REST, POOR_SAVES
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.survey import read_manifest
from dtr.config import Settings
from dtr.errors import CheckpointAborted, CheckpointConflict, IntegrityError, InvalidInput, RestoreFailed, WorldSizeMismatch
from dtr.state.job import JobState
from dtr.store import open_store
from tests.chunked import CHUNK_BYTES, same, weights
from tests.ranks import Rank, running
from tests.servers import SeaweedServer, seaweed_server
from tests.uploading import Uploads, uploading
from tests.waiting import eventually

WITHIN_S = 30


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunk_format.cut.__kwdefaults__, "chunk_bytes", CHUNK_BYTES)


def of_rank(rank: Rank, step: int = 1) -> dict[str, Any]:
    """The optimizer is common to all ranks, the loader is the rank's own."""
    return {
        "optimizer": {"m": np.arange(50_000, dtype=np.float32) + step, "v": np.full((64, 8), step, np.float16), "step": step},
        "loader": {"rank": rank.rank, "seen": np.arange(rank.rank * 10)},
    }


def check(found: Any, rank: Rank, step: int = 1) -> None:
    expected = of_rank(rank, step)
    for top in expected:
        for name, value in expected[top].items():
            assert np.array_equal(found[top][name], value)


class TestReplicated:
    def test_each_rank_writes_a_share(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """Three ranks: the common bytes are in the store once, each rank gets its state, and the manifest says so."""
        with running(settings, store, 3) as job:
            handles = job.each(lambda rank: rank.manager.save_async(of_rank(rank), 1, replicated="optimizer/*"))
            run = handles[0].durable.result(WITHIN_S).run
            for rank, found in zip(job.ranks, job.restore(), strict=True):
                check(found.state, rank)
        manifest = read_manifest(open_store(str(store)).child(settings.job), run, 1)
        assert (manifest.replicated, len(manifest.parts)) == ("some", 3)
        sizes = [part.size_bytes for part in manifest.parts]
        assert sum(sizes) < 1.1 * 200_000 + 3 * 2_500
        assert max(sizes) - min(sizes) < 2_500

    def test_another_number_of_ranks(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """A run of two ranks is told what of three ranks' checkpoint fits; what all of is common it simply gets."""
        with running(settings, store, 3) as job:
            job.each(lambda rank: rank.manager.save_async(of_rank(rank), 1, replicated="optimizer/*").durable.result(WITHIN_S))
        with running(settings, store, 2, names="x") as job:
            for error in job.restore():
                assert isinstance(error, WorldSizeMismatch)
                assert "loader" in str(error)
        with running(settings, store, 3, names="y") as job:
            job.restore()
            common = {"optimizer": of_rank(job.ranks[0], 2)["optimizer"]}
            job.each(lambda rank: rank.manager.save_async(common, 2, replicated=["optimizer"]).durable.result(WITHIN_S))
        with running(settings, store, 2, names="z") as job:
            for found in job.restore():
                assert found.step == 2
                assert np.array_equal(found.state["optimizer"]["m"], common["optimizer"]["m"])

    def test_ranks_that_do_not_hold_the_same(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """Common tensors of other shapes: the checkpoint never becomes one, and the rank that came later is told why."""
        with running(settings, store, 2) as job:
            handles = job.each(lambda rank: rank.manager.save_async({"m": np.zeros(100 + rank.rank)}, 1, replicated="m"))
            errors = [handle.durable.exception(WITHIN_S) for handle in handles]
            assert {type(error) for error in errors} == {CheckpointAborted, CheckpointConflict}
            assert all("begun with replicated tensors of other names, shapes or dtypes" in str(error) for error in errors)
            assert all("must be alike on all ranks" in str(error) for error in errors)
            assert job.ranks[0].manager.latest() is None

    def test_ranks_whose_values_differ(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """Common tensors that nobody made alike: no checkpoint, and the reason names the first; once they are alike, the next commits."""
        with running(settings, store, 2) as job:
            states = [{"opt": {"lr": np.ones(3), "m": np.full(1000, rank), "v": np.full(10, rank)}, "own": rank} for rank in range(2)]
            handles = job.each(lambda rank: rank.manager.save_async(states[rank.rank], 1, replicated="opt/*"))
            errors = [handle.durable.exception(WITHIN_S) for handle in handles]
            assert {type(error) for error in errors} == {CheckpointAborted, CheckpointConflict}
            assert all("begun with replicated opt/m of other values than rank" in str(error) for error in errors)
            states[1]["opt"] = states[0]["opt"]
            handles = job.each(lambda rank: rank.manager.save_async(states[rank.rank], 2, replicated="opt/*"))
            assert [handle.durable.result(WITHIN_S).step for handle in handles] == [2, 2]

    def test_wrong_arguments(self, settings: Settings, store: Path, uploads: Uploads) -> None:
        """No pattern, or one that selects nothing, names the argument; the others are told, and the next save works."""
        with running(settings, store, 1) as job:
            manager = job.ranks[0].manager
            for wrong in (7, "", [], ["a", 3], None):
                with pytest.raises(InvalidInput, match="replicated"):
                    manager.save_async({"a": np.zeros(3)}, 1, replicated=wrong)  # type: ignore[arg-type]
            with pytest.raises(InvalidInput, match="optimiser.*holds a"):
                manager.save_async({"a": np.zeros(3)}, 1, replicated="optimiser/*")
            assert manager.save_async({"a": np.zeros(3)}, 2, replicated="a").durable.result(WITHIN_S).step == 2


@pytest.fixture
def delta(settings: Settings) -> Settings:
    return replace(settings, delta="auto", keep_last=2, reader_grace_s=0.0)


def stored(store: Path, job: str) -> tuple[int, int]:
    """Number and bytes of the chunks."""
    files = [path for path in (store / job / "chunks").rglob("*") if path.is_file() and "condemned" not in str(path)]
    return len(files), sum(path.stat().st_size for path in files)


class TestDelta:
    def test_only_what_changed_is_stored(self, delta: Settings, store: Path, uploads: Uploads) -> None:
        """Ten of twelve tensors are frozen: the second save costs a sixth; both come back, also without Redis."""
        with CheckpointManager(store, settings=delta) as manager:
            manager.save_async(weights(1, frozen=10), 1).durable.result(WITHIN_S)
            _, first_bytes = stored(store, delta.job)
            commit = manager.save_async(weights(2, frozen=10), 2).durable.result(WITHIN_S)
            _, both_bytes = stored(store, delta.job)
            assert both_bytes - first_bytes < 0.2 * first_bytes
            assert commit.size_bytes > first_bytes
            for step in (1, 2):
                found = manager.restore(step)
                assert found is not None
                assert same(found.state, weights(step, frozen=10))
            assert manager.verify(commit.run, 2).size_bytes == commit.size_bytes
        alone = CheckpointManager(store, settings=replace(delta, redis_url="redis://127.0.0.1:1/0"))
        found = alone.restore()
        assert found is not None
        assert same(found.state, weights(2, frozen=10))

    def test_retention_lets_chunks_go(self, delta: Settings, store: Path, uploads: Uploads) -> None:
        """Of many saves, the store holds the chunks of those that are kept; the frozen ones stay, under the names of the first save."""
        with CheckpointManager(store, settings=delta) as manager:
            for step in range(1, 8):
                manager.save_async(weights(step, frozen=10), step).durable.result(WITHIN_S)
                if step == 1:
                    one, _ = stored(store, delta.job)
            # A commit is told before what it made superfluous is gone.
            eventually(lambda: [one.step for one in manager.list() if one.state == "COMMITTED"] == [7, 6], what="retention to end")
            kept = [listed for listed in manager.list() if listed.state == "COMMITTED"]
            eventually(lambda: stored(store, delta.job)[0] <= one + 5 * len(kept), what="chunks to go")
            eventually(lambda: not list(open_store(str(store)).child(delta.job).list(CONDEMNED)), what="the collection to end")
            for listed in kept:
                manager.verify(listed.run, listed.step)

    def test_the_same_step_twice(self, delta: Settings, store: Path, uploads: Uploads) -> None:
        """The same bytes are fine, other bytes are a conflict, though what the manifest names is a recipe."""
        with CheckpointManager(store, settings=delta) as manager:
            manager.save_async(weights(1), 1).durable.result(WITHIN_S)
            manager.save_async(weights(1), 1).durable.result(WITHIN_S)
            with pytest.raises(CheckpointConflict, match="other bytes"):
                manager.save_async(weights(2), 1).durable.result(WITHIN_S)

    def test_a_damaged_chunk(self, delta: Settings, store: Path, uploads: Uploads) -> None:
        """A flipped bit in a chunk that only the newest commit names: it is refused by name, and the older one restored."""
        with CheckpointManager(store, settings=delta) as manager:
            manager.save_async(weights(1, frozen=10), 1).durable.result(WITHIN_S)
            before = set((store / delta.job / "chunks").rglob("*"))
            run = manager.save_async(weights(2, frozen=10), 2).durable.result(WITHIN_S).run
            victim = max(set((store / delta.job / "chunks").rglob("*")) - before, key=lambda path: path.is_file() and path.stat().st_size)
            content = bytearray(victim.read_bytes())
            content[7] ^= 1
            victim.write_bytes(content)
            with pytest.raises(IntegrityError, match=victim.name):
                manager.verify(run, 2)
            with CheckpointManager(store, settings=replace(delta, staging=delta.staging + "-other")) as reader:
                found = reader.restore()
                assert found is not None
                assert found.step == 1
                with pytest.raises(RestoreFailed, match=victim.name):
                    reader.restore(2)

    def test_it_turns_itself_off(self, delta: Settings, store: Path, uploads: Uploads) -> None:
        """Every tensor trained: after a few saves delta rests, with an event, and saves are whole objects until it tries again."""
        with CheckpointManager(store, settings=delta) as manager:
            for step in range(POOR_SAVES + 2):
                run = manager.save_async(weights(step), step).durable.result(WITHIN_S).run
            state = JobState(delta.redis_url, delta.job, name="test")
            kinds = [read_manifest(open_store(str(store)).child(delta.job), run, step).parts[0].kind for step in (step - 1, step)]
            assert kinds == ["chunks", "file"]
            events = [fields for _, fields in state.redis.xrange(state.keys.events) if fields["event"].startswith("delta_")]
            assert [event["event"] for event in events] == ["delta_off"]
            assert "stored whole" in events[0]["reason"]
            assert int(state.redis.hget(state.keys.delta, "0/rest")) == FIRST_REST - 1
            found = manager.restore()
            assert found is not None
            assert same(found.state, weights(step))
            state.close()

    def test_replicated_and_delta_together(self, delta: Settings, store: Path, uploads: Uploads) -> None:
        """A share of a replicated state in chunks, read by every rank from the chunks of all."""
        with running(delta, store, 2) as job:
            for step in (1, 2):
                job.each(
                    lambda rank, step=step: rank.manager.save_async(of_rank(rank, step), step, replicated="optimizer").durable.result(
                        WITHIN_S
                    )
                )
            for rank, found in zip(job.ranks, job.restore(), strict=True):
                check(found.state, rank, 2)


@pytest.fixture(scope="module")
def weed() -> Iterator[SeaweedServer]:
    with seaweed_server() as server:
        yield server


def test_delta_on_s3(delta: Settings, weed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a real S3 server: reuse, retention and collection."""
    for name, value in weed.env.items():
        monkeypatch.setenv(name, value)
    url = weed.url("delta")
    with uploading(delta) as running_uploads, CheckpointManager(url, settings=delta) as manager:
        store = open_store(url).child(delta.job)
        for step in range(1, 5):
            manager.save_async(weights(step, frozen=10), step).durable.result(WITHIN_S)
        found = manager.restore()
        assert found is not None
        assert same(found.state, weights(4, frozen=10))
        assert len(list(store.list("chunks"))) <= 13 + 3 * 4
        store.close()
    assert not running_uploads.failures
