"""`dtr data which, replay, skip, show, progress`: what a step consumed, in Redis and in the store, along the lineage that survives."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from dtr.checkpoint.manager import CheckpointManager
from dtr.cli import main
from dtr.config import Settings
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.timemachine import skipping
from dtr.datasets.timemachine.history import history_of
from dtr.errors import CoordinatorUnavailable, InvalidInput, StepUnknown
from tests.loading import Loading, damage, loading, once_each, write_lines
from tests.servers import RedisServer
from tests.uploading import uploading
from tests.waiting import eventually
from worker_agent import Agent

NOBODY = "redis://127.0.0.1:1/0"
MODE: dict[str, Any] = {"mode": "deterministic", "global_batch_size": 24, "window": 64}
Dtr = Callable[..., Any]


@pytest.fixture
def stored(settings: Settings, tmp_path: Path) -> Settings:
    """A job with a store, and 400 samples in 16 shards of 4 files."""
    registry = DatasetRegistry(settings.redis_url, job=settings.job)
    registry.register("numbers", path=write_lines(tmp_path / "data", 400), format="jsonl", shard_size=25, shuffle=True)
    registry.close()
    return replace(settings, store=str(tmp_path / "store"))


@pytest.fixture
def dtr(stored: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dtr:
    """Runs a command of `dtr data` on 80 columns; ``call.err`` is what it said on stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args: str, code: int = 0, url: str = "", store: str = "") -> Any:
        got = main(["data", *args, "--url", url or stored.redis_url, "--job", stored.job, *(["--store", store] if store else [])])
        out, err = capsys.readouterr()
        assert got == code, (out, err)
        assert all(len(line) <= 80 for line in out.splitlines()) or "--json" in args
        call.err = err  # type: ignore[attr-defined]
        return json.loads(out) if "--json" in args else out

    return call


@contextmanager
def training(settings: Settings, size: int, names: str) -> Iterator[tuple[Loading, Callable[[int], str]]]:
    """Ranks that restored what there is, and a call that commits a step and returns its run."""
    with uploading(settings), loading(settings, size, names=names) as job:
        managers = [CheckpointManager(str(settings.store), session=rank.session) for rank in job.ranks]

        def begin(rank: Any) -> None:
            found = managers[rank.session.run.rank].restore(fresh=True)
            rank.step = -1 if found is None else found.step

        def save(step: int) -> str:
            handles = job.each(lambda rank: managers[rank.session.run.rank].save_async({"step": step}, step, replicated=True))
            return {str(handle.durable.result(60).run) for handle in handles}.pop()

        job.each(begin)
        try:
            yield job, save
        finally:
            for manager in managers:
                manager.close(0.5)


def files_of(batch: dict[str, Any]) -> set[int]:
    """The ids that `which` names: file n begins with id 100 n."""
    return {100 * int(f["file"][5]) + at for f in batch["files"] for at in range(f["start"], f["stop"])}


def seen_at(job: Loading, step: int, first: int = 0) -> list[set[int]]:
    """What each rank's trainer wrote down at a step; its first was ``first``."""
    return [set(rank.seen[step - first][1]) for rank in job.ranks]


@pytest.mark.parametrize("options", [{}, MODE], ids=["dynamic", "deterministic"])
def test_which_and_replay_follow_the_lineage(stored: Settings, dtr: Dtr, options: dict[str, Any]) -> None:
    """Run a commits step 3 and trains to 6; b goes on from 3 on other ranks: step 2 is a's, step 5 is b's; a's step 5 only by name."""
    with training(stored, 3, "a") as (a, save):
        a.train(4, **options)
        a.told()
        run_a = save(3)
        a.train(3, **options)
        a.told()
        eventually(lambda: dtr("which", "--step", "6", "--json")["batches"][2:], what="the report of step 6")
        left = dtr("which", "--step", "5", "--json")
        assert [files_of(batch) for batch in left["batches"]] == seen_at(a, 5)
        assert (left["source"], left["on_lineage"]) == ("redis", True)
    with training(stored, 2, "b") as (b, save):
        b.train(4, **options)
        b.told()
        run_b = save(7)
        found = dtr("which", "--step", "5", "--json")
        assert (found["run"], [files_of(batch) for batch in found["batches"]]) == (run_b, seen_at(b, 5, 4))
        assert dtr("which", "--step", "2", "--json")["run"] == run_a
        left = dtr("which", "--step", "5", "--run", run_a, "--json")
        assert not left["on_lineage"] and [files_of(batch) for batch in left["batches"]] == seen_at(a, 5)
        again = dtr("replay", "--step", "2", "--rank", "1", "--column", "id", "--json")
        assert [row["id"] for row in again["batches"][0]["rows"]] == a.ranks[1].seen[2][1]
        dtr("which", "--step", "999", code=1)
        assert f"nobody has consumed step 999 of run {run_b} yet: Redis has its steps up to 7" in dtr.err  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{}, MODE], ids=["dynamic", "deterministic"])
def test_the_store_alone_tells_what_was_committed(stored: Settings, dtr: Dtr, options: dict[str, Any], tmp_path: Path) -> None:
    """No Redis at all: `which`, `replay` and `show` go by the store, and name what the trainers wrote down."""
    with training(stored, 2, "a") as (a, save):
        a.train(3, **options)
        a.told()
        save(2)
        a.train(2, **options)
        a.told()
        save(4)
    away = {"url": NOBODY, "store": str(stored.store)}
    for step in range(5):
        found = dtr("which", "--step", str(step), "--json", **away)
        assert (found["source"], [files_of(batch) for batch in found["batches"]]) == ("store", seen_at(a, step))
    out = tmp_path / "step.npz"
    dtr("replay", "--step", "1", "--rank", "0", "--out", str(out), **away)
    with np.load(out) as arrays:
        assert arrays["numbers.0.1.id"].tolist() == a.ranks[0].seen[1][1]
    dtr("replay", "--step", "1", "--out", str(out), code=3, **away)
    with history_of(url=NOBODY, job=stored.job, store=stored.store) as history:
        read = [one.read(["id"]) for one in history.at(1).consumed]
    assert [batch["id"].tolist() for batch in read] == [rank.seen[1][1] for rank in a.ranks]
    with pytest.raises(CoordinatorUnavailable), history_of(url=NOBODY, job=stored.job):
        pass
    assert dtr("show", "numbers", "--json", **away)["committed"]["step"] == 4
    dtr("which", "--step", "5", code=1, **away)
    dtr("progress", code=3, **away)
    assert "Redis" in dtr.err  # type: ignore[attr-defined]


def test_skipped_samples_stay_away_after_redis_was_emptied(stored: Settings, own_valkey: RedisServer, dtr: Dtr, tmp_path: Path) -> None:
    """Skipped before and in the run; the manifest has them, the next run leaves them out, each other sample comes once."""
    own = replace(stored, redis_url=own_valkey.url)
    registry = DatasetRegistry(own.redis_url, job=own.job)
    facts = {"path": tmp_path / "data", "format": "jsonl", "shard_size": 25, "shuffle": True}
    registry.register("numbers", **facts)
    text = ("skip", "numbers", "part-1.jsonl:20-30", "--reason", "duplicated rows")
    assert dtr(*text, "--json", url=own.redis_url)["new"] is True
    assert dtr(*text, "--json", url=own.redis_url)["new"] is False
    with training(own, 2, "a") as (a, save):
        a.train(4)
        a.told()
        save(3)
        seen = a.seen()
    with redis.Redis.from_url(own.redis_url) as raw:
        raw.flushall()
    registry.register("numbers", **facts)
    with training(own, 3, "b") as (b, save):
        b.train(epochs=2)
        b.told()
        save(b.ranks[0].step)
        wanted = set(range(400)) - set(range(120, 130))
        assert once_each(seen + b.seen(), wanted)
        assert once_each(b.seen(1), wanted)
        shown = dtr("show", "numbers", "--json", url=own.redis_url)
    assert [(one["file"], one["start"], one["stop"], one["reason"]) for one in shown["skipped"]] == [
        ("part-1.jsonl", 20, 30, "duplicated rows")
    ]
    assert {(note["epoch"], note["kind"], note["samples"]) for note in shown["committed"]["notes"]} == {
        (0, "skipped", 10),
        (1, "skipped", 10),
    }
    assert "duplicated rows" in dtr("show", "numbers", url=own.redis_url)


def test_a_skip_leaves_the_global_batch_smaller_and_the_sequence_as_it_is(stored: Settings, dtr: Dtr) -> None:
    """Deterministic mode: the same batches without the samples, on any number of ranks, in equal steps."""
    with loading(stored, 1, names="a") as job:
        job.train(**MODE)
        job.told()
        plain = [set(ids) for _, ids in job.ranks[0].seen]
    dtr("skip", "numbers", "part-0.jsonl:3-7", "--reason", "broken")
    with loading(replace(stored, store=None), 3, names="b") as job:
        steps = job.train(**MODE)
        job.told()
        assert len(set(steps)) == 1
        batches = [set().union(*(set(rank.seen[n][1]) for rank in job.ranks)) for n in range(steps[0])]
        assert batches == [ids - {3, 4, 5, 6} for ids in plain]
        notes = job.merged()["numbers"]["notes"]["skipped"]["0"]
        assert sum(int(stop) - int(start) for held in notes.values() for start, _, stop in (w.partition("-") for w in held.split(","))) == 4
        eventually(lambda: dtr("which", "--step", str(steps[0] - 1), "--json")["batches"], what="the report of the last step")
        which = [dtr("which", "--step", str(n), "--json") for n in range(steps[0])]
    assert [set().union(*(files_of(batch) for batch in one["batches"])) for one in which] == batches
    assert sum(f["stop"] - f["start"] for one in which for batch in one["batches"] for f in batch["skipped"]) == 4


def test_a_skip_holds_for_what_is_leased_and_not_ordered_yet(stored: Settings, dtr: Dtr, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic mode: a rank that holds the shard leaves them out, and that is on record; the next run finds the epoch whole without them."""
    monkeypatch.setattr(skipping, "LOOK_S", 0.0)
    with loading(stored, 1, names="a") as job:
        job.ranks[0].registry.register("one", path=Path(stored.store or "").parent / "data", format="jsonl", shard_size=100)
        (rank,) = job.ranks
        loader = rank.loader("one", prefetch=1)
        for _ in range(2):
            rank.consume(next(loader))
        shard = rank.seen[0][1][0] // 100
        dtr("skip", "one", f"part-{shard}.jsonl:90-97", "--reason", "broken")
        for _ in range(4):
            rank.consume(next(loader))
        assert job.merged()["one"]["notes"]["skipped"] == {"0": {str(shard): "90-97"}}
        cut, seen = job.merged(), job.seen()
    with loading(replace(stored, store=None), 2, names="b") as job:
        job.restored(cut)
        meeting = job.each(lambda rank: [rank.consume(batch) for batch in rank.loader("one")])
        assert len({len(of) for of in meeting}) == 1
        assert once_each(seen + job.seen(), set(range(400)) - set(range(100 * shard + 90, 100 * shard + 97)))


def test_a_skip_finds_the_data_set_by_its_file(stored: Settings, dtr: Dtr, tmp_path: Path) -> None:
    """One data set alone has it; or there are several, or none, and the candidates are named."""
    assert dtr("skip", "part-0.jsonl:3-7", "--reason", "broken", "--json")["dataset"] == "numbers"
    dtr("skip", "part-9.jsonl:0-5", "--reason", "x", code=3)
    assert "no data set of the job has a file 'part-9.jsonl'; it has: numbers" in dtr.err  # type: ignore[attr-defined]
    with closing(DatasetRegistry(stored.redis_url, job=stored.job)) as registry:
        registry.register("again", path=tmp_path / "data", format="jsonl", shard_size=10)
    dtr("skip", "part-0.jsonl:3-7", "--reason", "broken", code=3)
    assert "data sets again, numbers have a file 'part-0.jsonl'" in dtr.err  # type: ignore[attr-defined]
    assert dtr("skip", "again", "part-0.jsonl:3-7", "--reason", "broken", "--json")["dataset"] == "again"
    dtr("skip", "a", "b", "c:0-1", "--reason", "broken", code=2)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("skip", "numbers", "part-9.jsonl:0-5", "--reason", "x"), 3, "has no file 'part-9.jsonl'"),
        (("skip", "numbers", "part-0.jsonl:90-101", "--reason", "x"), 3, "has 100 samples"),
        (("skip", "numbers", "part-0.jsonl:5-5", "--reason", "x"), 3, "FILE:START-STOP"),
        (("skip", "numbers", "part-0.jsonl:5-6", "--reason", " \t"), 3, "reason must say why"),
        (("skip", "numbers", "part-0.jsonl:5-6"), 2, "--reason"),
        (("skip", "letters", "part-0.jsonl:5-6", "--reason", "x"), 3, "no data set 'letters'"),
        (("show", "letters"), 3, "no data set 'letters'"),
        (("progress", "letters"), 3, "no data set 'letters'"),
        (("which", "--step", "-1"), 2, "--step"),
        (("which", "--step", "0"), 1, "no run yet"),
        (("which", "--step", "0", "--run", "a/b"), 3, "run must be"),
    ],
)
def test_what_is_wrong_is_named(dtr: Dtr, words: tuple[str, ...], code: int, said: str) -> None:
    """Exit codes: usage 2, a wrong argument 3, nothing on record 1."""
    dtr(*words, code=code)
    assert said in dtr.err  # type: ignore[attr-defined]


def test_progress_by_shard_and_worker(stored: Settings, dtr: Dtr) -> None:
    """Midway: samples consumed, what is left out, each worker's, and every shard's state; at the end of it all, nothing is left."""
    assert dtr("progress", "--json") == {"job": stored.job, "run": "", "running": False, "datasets": []}
    dtr("skip", "numbers", "part-3.jsonl:0-5", "--reason", "x")
    with loading(stored, 2, names="a") as job:
        job.train(6)
        job.told()
        eventually(lambda: dtr("which", "--step", "5", "--json")["batches"][1:], what="the report of step 5")
        (one,) = dtr("progress", "--json")["datasets"]
        assert (one["epoch"], one["samples"], one["consumed"]) == (0, 400, 120)
        assert [(worker["worker"], worker["samples"]) for worker in one["workers"]] in (
            [("a0", 50), ("a1", 50)], [("a0", 50), ("a1", 60)], [("a0", 60), ("a1", 50)], [("a0", 60), ("a1", 60)],
        )  # fmt: skip
        assert sum(shard["consumed"] for shard in one["shards"]) == 120
        assert Counter(shard["state"] for shard in one["shards"]).keys() >= {"done", "leased", "free"}
        assert "120 of 400 samples" in dtr("progress", "--shards")
        job.train()
        job.told()
        (one,) = dtr("progress", "numbers", "--json")["datasets"]
        assert (one["consumed"], one["left_out"], one["eta_s"]) == (395, 5, 0.0)
        assert {shard["state"] for shard in one["shards"]} == {"done"}


def test_a_quarantined_shard_is_shown_with_its_error(stored: Settings, dtr: Dtr, tmp_path: Path) -> None:
    """In `show`, by file and samples; in `progress` as such."""
    broken = tmp_path / "data" / "part-2.jsonl"
    facts = broken.stat()
    content = broken.read_bytes()
    broken.write_bytes(b"x" + content[1:])
    os.utime(broken, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with loading(stored, 1, names="a") as job:
        job.train()
        job.told()
        shown = dtr("show", "numbers", "--json")
        (bad,) = shown["quarantined"]
        assert (bad["shard"], bad["file"], bad["start"], bad["stop"]) == (8, "part-2.jsonl", 0, 25)
        assert "part-2.jsonl" in bad["error"]
        assert "quarantine" in dtr("show", "numbers")
        (one,) = dtr("progress", "--json")["datasets"]
        assert (one["consumed"], one["left_out"]) == (375, 25)
        assert [shard["shard"] for shard in one["shards"] if shard["state"] == "quarantined"] == [8]


def test_a_shard_is_let_out_of_quarantine(stored: Settings, dtr: Dtr, tmp_path: Path) -> None:
    """Given a damaged shard that a commit has on record, when a person lets it go, then `show` has it no more and the next run reads it."""
    broken = tmp_path / "data" / "part-2.jsonl"
    facts, content = broken.stat(), broken.read_bytes()
    damage(broken)
    with training(stored, 1, "a") as (job, save):
        save(job.train()[0] - 1)
    broken.write_bytes(content)
    os.utime(broken, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert "from 0 to 15" in dtr("release", "numbers", "16", "--json", code=3)["error"]
    assert dtr("release", "nothing", "--json", code=3)["code"] == "DatasetNotFound"
    assert dtr("release", "numbers", "8", "--json", code=4, url=NOBODY)["code"] == "CoordinatorUnavailable"
    assert "not in quarantine: 3" in dtr("release", "numbers", "3")
    told = dtr("release", "numbers", "8", "3", "--json")
    assert ([one["shard"] for one in told["released"]], told["not_there"]) == ([8], [3])
    assert "not JSON" in told["released"][0]["error"]
    assert "no shard of numbers is in quarantine" in dtr("release", "numbers")
    assert dtr("show", "numbers", "--json", store=stored.store)["quarantined"] == []
    with loading(stored, 1, names="b") as job:
        job.restored({}).train()
        assert once_each(job.seen(), range(400))


def test_an_agent_replays_a_step(stored: Settings) -> None:
    """The batch again, column by column; it is none that may be reported; what is unknown says so."""
    options = {"job": stored.job, "staging": stored.staging, "store": stored.store, "ttl_s": 3.0, "beat_interval_s": 0.2}
    with Agent("w0", stored.redis_url, 1, **options) as agent:  # type: ignore[arg-type]
        agent.restore(fresh=True)
        given = []
        for batch in agent.loader("numbers", batch_size=30, columns=["id", "x"]):
            given.append({name: values.tolist() for name, values in batch.items()})
            agent.step(batch)
        (again,) = eventually(lambda: replayed(agent, len(given) - 1), what="the report of the last step")
        assert {name: values.tolist() for name, values in again.items()} == given[-1]
        (again,) = agent.replay(3, columns=["x"])
        assert list(again) == ["x"] and again["x"].tolist() == given[3]["x"]
        with pytest.raises(InvalidInput):
            agent.step(again)
        with pytest.raises(StepUnknown, match="step 99"):
            agent.replay(99)


def replayed(agent: Agent, step: int) -> list[Any]:
    """The step's batches; nothing as long as Redis has not heard of it."""
    try:
        return agent.replay(step)
    except StepUnknown:
        return []


def test_events_tell_of_skips(stored: Settings, dtr: Dtr, capsys: pytest.CaptureFixture[str]) -> None:
    """As a sentence."""
    dtr("skip", "numbers", "part-0.jsonl:3-7", "--reason", "broken")
    assert main(["events", "--url", stored.redis_url, "--job", stored.job]) == 0
    assert "part-0.jsonl:3-7 of data set numbers are left out from now on: broken" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("options", [{}, MODE], ids=["dynamic", "deterministic"])
def test_progress_counts_what_the_lineage_consumed_before_the_run(stored: Settings, dtr: Dtr, options: dict[str, Any]) -> None:
    """Run a commits midway; in run b the epoch has what a consumed, to the sample, before b's first batch and after."""
    with training(stored, 3, "a") as (a, save):
        a.train(4, **options)
        a.told()
        save(3)
    before = sum(a.seen().values())
    with training(stored, 2, "b") as (b, _):
        b.train(2, **options)
        b.told()
        eventually(lambda: dtr("which", "--step", "5", "--json")["batches"][1:], what="the report of step 5")
        (one,) = dtr("progress", "--json")["datasets"]
        assert (one["consumed"], one["samples"]) == (before + sum(b.seen().values()), 400)
        assert [(worker["step"], worker["samples"]) for worker in one["workers"]] == [(5, len(ids)) for ids in seen_of(b)]
        b.train(**options)
        b.told()
        eventually(lambda: dtr("progress", "--json")["datasets"][0]["consumed"] == 400, what="the last reports")
        assert "over" in dtr("progress")


def seen_of(job: Loading) -> list[list[int]]:
    """All that each rank consumed."""
    return [[i for _, ids in rank.seen for i in ids] for rank in job.ranks]
