"""Loaders of several ranks on a real server: what they give, in how many batches, and where the next run goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from dtr.checkpoint.keeping.rebuild import rebuild
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.survey import read_manifest
from dtr.config import Settings
from dtr.datasets.consuming.cut import cut_at
from dtr.datasets.consuming.datastate import Dynamic
from dtr.datasets.consuming.ledger import quarantined, release
from dtr.datasets.plane import merge_shares
from dtr.datasets.registering import spec as spec_module
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.errors import (
    DataConflict,
    DatasetMismatch,
    DataUnavailable,
    ForkedProcess,
    InvalidInput,
    LedgerUnset,
    RosterChanged,
    ShardUnreadable,
)
from dtr.state.job import JobState
from dtr.state.keys import Keys
from dtr.state.scripts import load
from dtr.store import open_store
from tests.loading import Loading, damage, loading, once_each, registered, write_lines
from tests.proxy import Proxy
from tests.servers import RedisServer
from tests.uploading import uploading
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


numbers = pytest.fixture(registered)


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 10), (3, 7), (4, 60)])
def test_every_sample_once_and_as_many_steps_for_all(settings: Settings, numbers: Path, ranks: int, batch_size: int) -> None:
    """Given shards that do not divide evenly, when all ranks train two epochs, then each sample came once in each, in equal steps."""
    with loading(settings, ranks) as job:
        steps = job.train(batch_size=batch_size, epochs=2)
        assert len(set(steps)) == 1
        for epoch in (0, 1):
            assert once_each(job.seen(epoch), range(400))


def test_ranks_need_no_collective_to_agree_on_the_end(settings: Settings, numbers: Path) -> None:
    """Given ranks that do not wait for each other, when one is much faster, then they still have as many batches."""
    with loading(settings, 3) as job:
        assert len(set(job.train(lockstep=False, epochs=2))) == 1
        assert once_each(job.seen(1), range(400))


@pytest.mark.parametrize("steps", [1, 5, 13, 17])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_the_next_run_goes_on_with_another_number_of_ranks(settings: Settings, numbers: Path, steps: int, after: int) -> None:
    """Given a cut in mid-epoch, when other ranks go on from its data state, then each sample of the epochs was consumed once."""
    with loading(settings, 3, names="a") as first:
        first.train(steps, batch_size=9, epochs=2)
        cut = first.merged()
        seen = [first.seen(0), first.seen(1)]
    with loading(settings, after, names="b") as second:
        second.restored(cut).train(batch_size=9, epochs=2)
        for epoch in (0, 1):
            assert once_each(seen[epoch] + second.seen(epoch), range(400))


def test_a_finished_state_has_nothing_left(settings: Settings, numbers: Path) -> None:
    """Given the state after the last epoch, when it is restored, then there is no batch, on any rank."""
    with loading(settings, 2, names="a") as job:
        job.train()
        cut = job.merged()
    with loading(settings, 2, names="b") as job:
        assert job.restored(cut).train() == [0, 0]


def test_more_ranks_than_shards_give_empty_batches_of_the_right_kind(settings: Settings, tmp_path: Path) -> None:
    """Given two shards and four ranks, when they load, then some have only empty batches, of the right columns and dtypes."""
    with loading(settings, 4) as job:
        job.ranks[0].registry.register("numbers", path=write_lines(tmp_path / "d", 20, 1), format="jsonl", shard_size=10)
        batches = job.each(lambda rank: list(rank.loader(batch_size=5, columns=["x", "id"])))
        assert len({len(of) for of in batches}) == 1
        assert sum(not sum(map(len, of)) for of in batches) >= 2
        assert {str(batch["x"].dtype) for of in batches for batch in of} == {"float64"}
        assert sorted(int(i) for of in batches for batch in of for i in batch["id"]) == list(range(20))


def test_padding_fills_every_batch_and_is_on_record(settings: Settings, tmp_path: Path) -> None:
    """Given tail='pad', when ranks run out at different times, then all batches are full, and what came twice is in the data state."""
    with loading(settings, 3) as job:
        job.ranks[0].registry.register("numbers", path=write_lines(tmp_path / "d", 50, 1), format="jsonl", shard_size=20)
        job.train(batch_size=8, tail="pad")
        assert {len(ids) for rank in job.ranks for _, ids in rank.seen} == {8}
        counts = job.seen()
        assert set(counts) == set(range(50))
        assert job.merged()["numbers"]["done"] == "0-2"
        assert job.merged()["numbers"]["notes"]["padded"]["0"]


def test_what_was_handed_out_and_not_reported_is_read_again(settings: Settings, numbers: Path) -> None:
    """Given batches that the trainer never reported, when another run goes on, then they come again."""
    with loading(settings, 1, names="a") as job:
        loader = job.ranks[0].loader()
        for n in range(6):
            batch = next(loader)
            if n < 3:
                job.ranks[0].consume(batch)
        cut, seen = job.merged(), job.seen()
    with loading(settings, 1, names="b") as job:
        job.restored(cut).train()
        assert once_each(seen + job.seen(), range(400))


def test_an_unreported_batch_of_a_finished_epoch_is_on_record_as_dropped(settings: Settings, numbers: Path) -> None:
    """Given a batch that was left out, when the next epoch is under way, then the record says which samples that were."""
    with loading(settings, 1) as job:
        for n, batch in enumerate(job.ranks[0].loader(epochs=2)):
            if n == 4:
                left_out = sorted(batch.ranges)
            elif n < 50:
                job.ranks[0].consume(batch)
        dropped = job.merged()["numbers"]["notes"]["dropped"]["0"]
        assert sorted((int(s), *map(int, part.split("-"))) for s, text in dropped.items() for part in text.split(",")) == left_out


def test_a_batch_counts_once_and_only_in_its_run(settings: Settings, numbers: Path) -> None:
    """Given a batch, when it is reported twice, or something else is reported, then that is refused, and nothing is counted."""
    with loading(settings, 1) as job:
        rank = job.ranks[0]
        batch = next(rank.loader())
        rank.consume(batch)
        before = job.merged()
        with pytest.raises(InvalidInput, match="reported before"):
            rank.plane.consumed(batch, 1)
        with pytest.raises(InvalidInput, match="what the loader gave"):
            rank.plane.consumed({"id": batch["id"]}, 1)
        again = next(rank.loader())
        for batches in ([again, again], [again, batch]):
            with pytest.raises(InvalidInput, match="reported before"):
                rank.plane.consumed(batches, 1)
        assert job.merged() == before
        rank.consume(again)
        assert job.merged() != before


def test_two_ranks_that_consumed_the_same_are_found_out(settings: Settings, numbers: Path) -> None:
    """Given shares that overlap, as after a Redis that forgot a lease, when they are merged, then that is a conflict."""
    with loading(settings, 1) as job:
        job.train(3)
        share = job.ranks[0].plane.captured(0)
        with pytest.raises(DataConflict, match="both consumed shard"):
            merge_shares({0: share, 1: share})


# --- what goes wrong --------------------------------------------------------------------------------------------------------


def test_a_shard_that_cannot_be_read_is_nobodys_and_on_record(settings: Settings, numbers: Path) -> None:
    """Given a damaged shard, when ranks train two epochs, then all else comes once, in equal steps, and the record has the error."""
    damage(numbers / "part-2.jsonl")
    with loading(settings, 3) as job:
        assert len(set(job.train(epochs=2))) == 1
        for epoch in (0, 1):
            assert once_each(job.seen(epoch), [*range(200), *range(225, 400)])
        found = job.merged()["numbers"]["notes"]["quarantined"]
        assert set(found) == {"0", "1"} and set(found["0"]) == {"8"}
        assert "part-2.jsonl" in found["0"]["8"] and "not JSON" in found["0"]["8"]
        keys = job.ranks[0].session.state.keys
        events = [e for _, e in job.ranks[0].session.state.redis.xrange(keys.events) if e["event"] == "shard_quarantined"]
        assert [e["shard"] for e in events] == ["8"]
        cut = job.merged()
    with loading(settings, 2, names="b") as job:  # with the quarantine the epoch is complete
        assert job.restored(cut).train(epochs=2) == [0, 0]


def test_an_epoch_of_few_shards_is_none(settings: Settings, numbers: Path) -> None:
    """Given more than a tenth of the shards damaged, then training ends with what to do, in the next run too, until they are let go."""
    whole = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in numbers.iterdir()}
    for path in whole:
        damage(path)
    with loading(settings, 1) as job, pytest.raises(ShardUnreadable, match=r"4 of 16 shards .*`dtr data release numbers`"):
        job.train()
    for path, (content, mtime_ns) in whole.items():
        path.write_bytes(content)
        os.utime(path, ns=(mtime_ns, mtime_ns))
    with loading(settings, 1, names="b") as job, pytest.raises(ShardUnreadable, match="too many to train without them"):
        job.restored({}).train()
    with loading(settings, 2, names="c") as job:
        state, spec = job.ranks[0].session.state, job.ranks[0].registry.get("numbers").spec
        assert release(state, spec, list(quarantined(state, spec))) == (0, 4, 8, 12)
        job.restored({}).train()
        assert once_each(job.seen(), range(400))


@pytest.mark.parametrize("processes", [0, 1])
def test_a_shard_that_was_let_go_is_read_from_the_next_epoch_on(settings: Settings, numbers: Path, processes: int) -> None:
    """Given a damaged shard, when its file is put back and it is let go while training goes on, then the next epoch has all of it."""
    path = numbers / "part-2.jsonl"
    content, mtime_ns = path.read_bytes(), path.stat().st_mtime_ns
    damage(path)
    with loading(settings, 1) as job:
        rank = job.ranks[0]
        state, spec = rank.session.state, rank.registry.get("numbers").spec
        loader = rank.loader(epochs=3, prefetch=1, processes=processes, start="fork")
        for batch in loader:
            rank.consume(batch)
            if batch.epoch == 0 and set(quarantined(state, spec)) == {8}:
                path.write_bytes(content)
                os.utime(path, ns=(mtime_ns, mtime_ns))
                assert release(state, spec, [8]) == (8,)
        assert not quarantined(state, spec)
        assert once_each(job.seen(0), [*range(200), *range(225, 400)])
        assert once_each(job.seen(2), range(400))


def test_a_host_that_may_not_read_leaves_out_no_shard(settings: Settings, numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given files that this host may not read, when training goes on, then it ends, and no shard is in quarantine."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with loading(settings, 1) as job:
        job.train(2)
        monkeypatch.setattr(spec_module, "open", refused, raising=False)
        with pytest.raises(DataUnavailable, match=r"cannot be read on this host: Permission denied"):
            job.train()
        assert not quarantined(job.ranks[0].session.state, job.ranks[0].registry.get("numbers").spec)


def test_samples_with_other_columns_leave_out_no_shard(settings: Settings, tmp_path: Path) -> None:
    """Given a key that some lines lack, when all columns are loaded, then that is an error at once; with columns=[...] all is read."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": i} | ({"x": i} if i % 7 else {})) + "\n" for i in range(100)))
    with closing(DatasetRegistry(settings.redis_url, job=settings.job)) as registry:
        registry.register("numbers", path=tmp_path, format="jsonl", shard_size=10)
    with loading(settings, 1) as job:
        with pytest.raises(InvalidInput, match=r"a\.jsonl line \d+ has .*'x', .*: give columns=\[\.\.\.\]"):
            job.train(columns=None)
        assert not quarantined(job.ranks[0].session.state, job.ranks[0].registry.get("numbers").spec)
    with loading(settings, 1, names="b") as job:
        job.restored({}).train(columns=["id"])
        assert once_each(job.seen(), range(100))


def test_a_changed_file_is_refused_and_not_left_out(settings: Settings, numbers: Path) -> None:
    """Given a file that was written to since it was registered, when it is loaded, then that is an error that names it."""
    with (numbers / "part-1.jsonl").open("a") as file:
        file.write("{}\n")
    with loading(settings, 1) as job, pytest.raises(DatasetMismatch, match=r"part-1\.jsonl changed since"):
        job.train()


def test_a_departure_ends_the_loader(settings: Settings, numbers: Path) -> None:
    """Given two ranks, when one leaves, then the other's loader raises it instead of ending the epoch."""
    with loading(settings, 2) as job:
        job.train(4)
        stays, leaves = job.ranks
        loader = stays.loader()
        leaves.session.close()

        def ended() -> bool:
            try:
                next(loader)
            except RosterChanged:
                return True
            except StopIteration:
                raise AssertionError("the epoch ended instead") from None
            return False

        eventually(ended, timeout_s=20, what="the loader to learn of it")


def test_a_ledger_needs_what_was_restored(settings: Settings, numbers: Path) -> None:
    """Given a run that follows another, with a store, when nothing was restored, then loading is refused rather than begun anew."""
    with loading(replace(settings, store="/tmp/none"), 1, names="a") as job:
        job.train(3)
        rank = job.ranks[0]
        rank.session.form()
        with pytest.raises(LedgerUnset, match=r"call restore\(\)"):
            rank.loader()
        rank.plane.restored({})
        assert rank.loader() is rank.loader()
        with pytest.raises(InvalidInput, match="one way"):
            rank.loader(batch_size=11)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"batch_size": 0}, "batch_size"), ({"batch_size": None}, "batch_size"), ({"mode": "random"}, "mode"), ({"tail": "cut"}, "tail"),
        ({"columns": []}, "columns"), ({"columns": ["id", "id"]}, "columns"), ({"columns": "id"}, "columns"), ({"epochs": 0}, "epochs"),
        ({"seed": -1}, "seed"), ({"prefetch": 0}, "prefetch"), ({"prefetch_bytes": 0}, "prefetch_bytes"), ({"window": 5}, "window"),
        ({"processes": -1}, "processes"), ({"start": "forkserver"}, "start"), ({"as_torch": 1}, "as_torch"),
        ({"global_batch_size": 8}, "global_batch_size"), ({"mode": "deterministic", "batch_size": 8}, "global_batch_size"),
        ({"mode": "deterministic"}, "global_batch_size"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(settings: Settings, numbers: Path, options: dict[str, Any], field: str) -> None:
    """Each is refused before anything is leased."""
    with loading(settings, 1) as job, pytest.raises(InvalidInput) as caught:
        job.ranks[0].loader(**options)
    assert caught.value.field == field


def test_a_column_that_is_not_there_is_no_reason_for_quarantine(settings: Settings, numbers: Path) -> None:
    """Given a misspelt column, when batches are asked for, then that is the trainer's error."""
    with loading(settings, 1) as job:
        with pytest.raises(InvalidInput, match="no column 'idd'"):
            next(job.ranks[0].loader(columns=["idd"]))
        assert job.ranks[0].session.state.redis.exists(job.ranks[0].session.state.keys.quarantine("numbers", "d")) == 0


def test_the_last_batch_of_all_is_not_consumed_before_it_is_reported(settings: Settings, numbers: Path) -> None:
    """Given a loader at its end whose last batch was not reported, when its state is loaded elsewhere, then that batch comes again."""
    with loading(settings, 1, names="a") as job:
        (rank,) = job.ranks
        loader = rank.loader()
        batches = list(loader)
        for batch in batches[:-1]:
            rank.consume(batch)
        early, seen = loader.state_dict(), job.seen()
        rank.consume(batches[-1])
        final = loader.state_dict()
    for state, left in ((early, len(batches[-1])), (final, 0)):
        with loading(settings, 1, names=f"b{left}") as job:
            job.ranks[0].loader().load_state_dict(state)
            job.train()
            assert sum(job.seen().values()) == left
            assert left == 0 or once_each(seen + job.seen(), range(400))


def test_the_state_of_any_rank_resumes_any_number_of_them(settings: Settings, numbers: Path) -> None:
    """Given state_dict of three ranks, which is equal, when two other ranks load one, then each sample was consumed once."""
    with loading(settings, 3, names="a") as job:
        job.train(5)
        states, seen = job.each(lambda rank: rank.loader().state_dict()), job.seen()
        assert states[0] == states[1] == states[2]
        with pytest.raises(DataConflict, match="before the first batch"):
            job.ranks[0].loader().load_state_dict(states)
    with loading(settings, 2, names="b") as job:
        for n, rank in enumerate(job.ranks):
            rank.loader().load_state_dict(json.loads(json.dumps(states[n % 3])))
        job.train()
        assert once_each(seen + job.seen(), range(400))


def test_a_forked_child_does_not_read_on(settings: Settings, numbers: Path) -> None:
    """Given a loader, when a child of its process uses it, then it is told, and the parent goes on."""
    with loading(settings, 1) as job:
        loader = job.ranks[0].loader()
        job.ranks[0].consume(next(loader))
        child = os.fork()
        if child == 0:  # pragma: no cover - another process
            status = 1
            with contextlib.suppress(BaseException):
                try:
                    next(loader)
                except ForkedProcess:
                    status = 0
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        job.train()
        assert once_each(job.seen(), range(400))


def test_a_lost_reply_to_a_lease_loses_no_shard(settings: Settings, numbers: Path, valkey: RedisServer) -> None:
    """Given a connection that breaks after the lease took effect, again and again, then each sample still comes once."""
    proxy = Proxy(valkey.port)
    try:
        cut = replace(settings, redis_url=f"redis://127.0.0.1:{proxy.port}/0")
        with loading(cut, 2) as job:
            for _ in range(4):
                proxy.drop_replies(2, matching=load("ledger_lease").sha.encode(), then="close")
                job.train(4)
            job.train()
            assert once_each(job.seen(), range(400))
    finally:
        proxy.close()


def test_what_a_killed_rank_had_handed_out_is_on_record(settings: Settings, numbers: Path) -> None:
    """Given a rank killed right after a batch was handed to it, then the ledger has that batch and all before it, sample by sample."""
    code = f"""
import os, signal
from tests.loading import Loading
from dtr.config import Settings
settings = Settings.load(environ={{}}, redis_url={settings.redis_url!r}, job={settings.job!r}, staging={settings.staging!r})
rank = Loading(settings, 1).start().ranks[0]
loader = rank.loader(batch_size=3)
for n in range(40):
    rank.consume(next(loader))
ids = [int(i) for i in next(loader)["id"]]
print(rank.session.run.id, sum((i for _, i in rank.seen), []) + ids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert out.returncode == -signal.SIGKILL, out.stderr
    run, _, ids = out.stdout.partition(" ")
    state = JobState(settings.redis_url, settings.job)
    registry = DatasetRegistry(settings.redis_url, job=settings.job)
    dataset = registry.get("numbers")
    keys = state.keys.ledger("numbers", 0, run)
    raw = redis.Redis.from_url(settings.redis_url)
    base = Dynamic(version=1, digest=dataset.spec.digest, seed=7)
    found = eventually(lambda: cut_at("numbers", base, state.redis.hgetall(keys.ledger), raw.get(keys.done) or b"", 40), what="the cut")
    held = {shard: ((0, 25),) for start, stop in found.done for shard in range(start, stop)} | dict(found.partial)
    told = {
        int(dataset.shard(shard).read(["id"])["id"][at]) for shard, of in held.items() for start, stop in of for at in range(start, stop)
    }
    assert told == set(json.loads(ids))
    registry.close()
    state.close()
    raw.close()


# --- in a checkpoint ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_data_state_and_an_empty_redis_goes_on_from_it(
    settings: Settings, numbers: Path, own_valkey: RedisServer
) -> None:
    """Given a replicated save of three ranks, when Redis is emptied, then two other ranks restore it and consume exactly the rest."""
    own = replace(settings, redis_url=own_valkey.url, store=str(numbers.parent / "store"))
    with uploading(own), saving(own, 3) as (job, managers):
        job.train(5)
        told = json.loads(job.ranks[0].plane.captured(0))
        handles = job.each(lambda rank: managers[rank.session.run.rank].save_async({"step": 4}, 4, replicated=True))
        commit = handles[0].durable.result(60)
        assert [handle.durable.result(60).step for handle in handles] == [4, 4, 4]
        seen, shown = job.seen(), job.merged()
        manifest = read_manifest(open_store(str(own.store)).child(own.job), commit.run, 4)
        assert dict(manifest.data) == shown
        parts = [dict(part) for part in safetensors_metadata(numbers.parent / "store")]
        assert [json.loads(part["dtr_data"]) for part in parts] == [told]
        job.train(3)  # consumed after the save: not in it
    with redis.Redis.from_url(own.redis_url) as raw:
        raw.flushall()
    with uploading(own), saving(own, 2, names="b") as (job, managers):
        found = job.each(lambda rank: managers[rank.session.run.rank].restore())
        assert [one.step for one in found] == [4, 4]
        job.ranks[0].registry.register("numbers", path=numbers, format="jsonl", shard_size=25, shuffle=True)
        job.train()
        assert once_each(seen + job.seen(), range(400))


def test_redis_is_emptied_between_the_seal_and_the_commit(
    settings: Settings, numbers: Path, own_valkey: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given an uploader that saw a sealed checkpoint, when Redis forgets the shares before it asks, then no commit is without them."""
    own = replace(settings, redis_url=own_valkey.url, store=str(numbers.parent / "store"))
    raw, key_of, emptied = redis.Redis.from_url(own.redis_url, decode_responses=True), Keys.ckpt_data, threading.Event()

    def forgetting(keys: Keys, run: str, step: int) -> str:
        if not emptied.is_set() and raw.hget(keys.ckpt(run, step), "state") == "SEALED":
            emptied.set()
            raw.flushall()
        return key_of(keys, run, step)

    monkeypatch.setattr(Keys, "ckpt_data", forgetting)
    with uploading(own), saving(own, 1) as (job, (manager,)):
        job.train(3)
        shown = job.merged()
        commit = manager.save_async({"step": 2}, 2).durable.result(60)
    assert emptied.is_set()
    assert dict(read_manifest(open_store(str(own.store)).child(own.job), commit.run, 2).data) == shown
    raw.close()


def test_a_step_that_is_saved_again_after_its_commit_is_the_same(settings: Settings, numbers: Path) -> None:
    """Given a commit that lets go of what its steps consumed, when a rank saves that step once more, then its part has not changed."""
    own = replace(settings, store=str(numbers.parent / "store"))
    with uploading(own), saving(own, 1) as (job, (manager,)):
        job.train(3)
        for _ in range(2):
            assert manager.save_async({"step": 2}, 2).durable.result(60).step == 2
        told = job.ranks[0].plane.captured(2)
        job.train(1)
        assert "steps" in json.loads(told)["numbers"]
        assert len(json.loads(job.ranks[0].plane.captured(3))["numbers"]["steps"]["rows"]) == 1


@contextlib.contextmanager
def saving(settings: Settings, size: int, *, names: str = "w") -> Iterator[tuple[Loading, list[CheckpointManager]]]:
    """Ranks that load and save."""
    with loading(
        settings, size, names=names, recover=lambda state, state_id: rebuild(state, str(settings.store), state_id=state_id)
    ) as job:
        if names == "w":
            job.ranks[0].registry.register(
                "numbers", path=Path(settings.store or "").parent / "data", format="jsonl", shard_size=25, shuffle=True
            )
        managers = [CheckpointManager(str(settings.store), session=rank.session) for rank in job.ranks]
        if names == "w":
            job.each(lambda rank: managers[rank.session.run.rank].restore(fresh=True))
        yield job, managers
        for manager in managers:
            manager.close(0.5)


def safetensors_metadata(store: Path) -> list[dict[str, str]]:
    """The metadata of every part in a store, read without dtr."""
    found = []
    for path in sorted(store.rglob("part-*.safetensors")):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        found.append(json.loads(content[8 : 8 + size])["__metadata__"])
    return found
