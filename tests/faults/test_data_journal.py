"""Deaths between the lines of the journal's protocol: what a step of the surviving lineage consumed is on record once, and rightly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from dtr.cli import main
from dtr.config import Settings
from dtr.datasets.plane import plane_of
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.timemachine.history import History
from dtr.datasets.timemachine.journal import journal_key
from dtr.errors import StepUnknown
from dtr.state.job import JobState
from dtr.store import Store, open_store
from tests.loading import write_lines
from tests.ranks import running
from tests.uploading import uploading

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, WITHIN_S = 120, 30

# Restores, consumes 12 samples a step and writes down what; saves each fourth step, and waits for the commit; the fault is for step 7.
TRAINER = """
import os, sys
from worker_agent import Agent
url, job, staging, store, log, fault = sys.argv[1:]
with Agent("w0", url, 1, job=job, staging=staging, store=store, ttl_s=1.5, beat_interval_s=0.2) as agent:
    agent.restore(fresh=True)
    out = open(log, "a", buffering=1)
    for batch in agent.loader("numbers", batch_size=12):
        if agent.current_step == 6:
            os.environ["DTR_FAILPOINT"] = fault
        out.write(f"{agent.run} {agent.step(batch)} {','.join(map(str, batch['id'].tolist()))}\\n")
        if agent.current_step % 4 == 3:
            agent.save_async({"step": agent.current_step}, replicated=True).durable.result(30)
    agent.save_async({"step": agent.current_step}, replicated=True).durable.result(30)
"""
UPLOADER = """
import sys
from dtr.config import Settings
from tests.uploading import Uploads
url, job, staging = sys.argv[1:]
Uploads(Settings.load(redis_url=url, job=job, staging=staging)).start()._thread.join()
"""


@pytest.fixture
def stored(settings: Settings, tmp_path: Path) -> Settings:
    registry = DatasetRegistry(settings.redis_url, job=settings.job)
    registry.register("numbers", path=write_lines(tmp_path / "data", SAMPLES), format="jsonl", shard_size=10, shuffle=True)
    registry.close()
    return replace(settings, store=str(tmp_path / "store"))


@pytest.fixture
def store(stored: Settings) -> Store:
    return open_store(str(stored.store)).child(stored.job)


@pytest.fixture
def state(stored: Settings) -> Iterator[JobState]:
    made = JobState(stored.redis_url, stored.job)
    yield made
    made.close()


@contextmanager
def started(code: str, *args: object, fault: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that runs ``code``; it is gone afterwards, whatever became of it."""
    environ = {**os.environ, "DTR_TESTING": "1", **({"DTR_FAILPOINT": fault} if fault else {})}
    command = [sys.executable, "-c", code, *map(str, args)]
    with subprocess.Popen(command, env=environ, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def train(settings: Settings, log: Path, fault: str = "none=raise") -> int:
    """One trainer to its end; its exit status."""
    with started(TRAINER, settings.redis_url, settings.job, settings.staging, settings.store, log, fault) as child:
        _, said = child.communicate(timeout=60)
    assert child.returncode in {0, -signal.SIGKILL}, said
    return child.returncode


def ids(consumed: Any) -> list[int]:
    """The ids of a batch of the history: file n begins with id 30 n."""
    return [30 * int(file[-7]) + at for file, start, stop in consumed.files() for at in range(start, stop)]


def logged(log: Path) -> dict[tuple[str, int], list[int]]:
    """What the trainers wrote down themselves: (run, step) -> ids."""
    rows = [line.split(" ") for line in log.read_text().splitlines()]
    return {(run, int(step)): [int(i) for i in some.split(",") if i] for run, step, some in rows}


@pytest.mark.parametrize("fault", ["save.before_share", "save.after_stage", "load.after_report"])
def test_a_killed_trainers_steps_are_those_that_survived(
    stored: Settings, store: Store, state: JobState, tmp_path: Path, fault: str
) -> None:
    """Killed at step 7, then another to the end: each step of the lineage names what its trainer wrote down, all of it once."""
    log = tmp_path / "log"
    with uploading(stored):
        assert train(stored, log, f"{fault}=kill") == -signal.SIGKILL
        assert train(stored, log) == 0
    wrote = logged(log)
    for history in (History(state, store, str(stored.store)), History(None, store, str(stored.store))):
        moments = [history.at(step) for step in range(SAMPLES // 12)]
        for moment in moments:
            assert [i for one in moment.consumed for i in ids(one)] == wrote[moment.run, moment.step]
            assert moment.on_lineage
        assert Counter(i for moment in moments for one in moment.consumed for i in ids(one)) == Counter(range(SAMPLES))
        with pytest.raises(StepUnknown):
            history.at(SAMPLES // 12)


@pytest.mark.parametrize("fault", ["commit.before_journal", "commit.after_journal"])
def test_a_killed_uploader_leaves_one_journal(stored: Settings, store: Store, tmp_path: Path, fault: str) -> None:
    """Killed on either side of the journal's put: the next uploader commits, and the store alone tells every step."""
    log = tmp_path / "log"
    with (
        started(UPLOADER, stored.redis_url, stored.job, stored.staging, fault=f"{fault}=kill") as dying,
        started(TRAINER, stored.redis_url, stored.job, stored.staging, stored.store, log, "none=raise") as trainer,
    ):
        dying.communicate(timeout=60)
        assert dying.returncode == -signal.SIGKILL
        with uploading(stored):
            _, said = trainer.communicate(timeout=60)
        assert trainer.returncode == 0, said
    wrote = logged(log)
    (run,) = {run for run, _ in wrote}
    assert journal_key(run, 3) in set(store.list("journal"))
    history = History(None, store, str(stored.store))
    assert [[i for one in history.at(step).consumed for i in ids(one)] for _, step in sorted(wrote)] == [
        wrote[key] for key in sorted(wrote)
    ]


def test_a_checkpoint_that_never_commits_loses_no_step(stored: Settings, store: Store) -> None:
    """Rank 1 does not save step 1, so that never commits; the checkpoint of step 3 has the steps of both since the beginning."""
    with uploading(stored), running(stored, Path(str(stored.store)), 2) as job:
        registry = DatasetRegistry(stored.redis_url, job=stored.job)
        planes = [plane_of(rank.session) for rank in job.ranks]
        loaders = [
            plane.loader(
                registry, "numbers", batch_size=10, global_batch_size=None, epochs=1, columns=None, seed=0, mode="dynamic", tail="empty",
                window=None, prefetch=2,
            )
            for plane in planes
        ]  # fmt: skip
        for step in range(4):
            for plane, loader in zip(planes, loaders, strict=True):
                plane.consumed(next(loader), step)
            if step == 1:
                job.ranks[0].manager.save_async({"step": 1}, 1, replicated=True)
        for handle in [rank.manager.save_async({"step": 3}, 3, replicated=True) for rank in job.ranks]:
            handle.durable.result(WITHIN_S)
        run = job.ranks[0].session.run.id
        for plane in planes:
            plane.close()
        registry.close()
    assert list(store.list("journal")) == [journal_key(run, 3)]
    history = History(None, store, str(stored.store))
    assert [[one.rank for one in history.at(step).consumed] for step in range(4)] == [[0, 1]] * 4


@pytest.mark.parametrize(("fault", "first"), [("skip.before_record", True), ("skip.after_record", False)])
def test_a_skip_that_was_killed_is_repeated(stored: Settings, capsys: pytest.CaptureFixture[str], fault: str, first: bool) -> None:
    """Nobody knows whether it took effect; the second time says, and it is on record once."""
    words = ["data", "skip", "numbers", "part-1.jsonl:3-7", "--reason", "bad", "--url", stored.redis_url, "--job", stored.job, "--json"]
    with started("import sys; from dtr.cli import main; sys.exit(main(sys.argv[1:]))", *words, fault=f"{fault}=kill") as child:
        child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["new"] is first
    with redis.Redis.from_url(stored.redis_url, decode_responses=True) as raw:
        events = [held for _, held in raw.xrange(f"dtr:{{{stored.job}}}:events") if held["event"] == "samples_skipped"]
        assert len(events) == raw.hlen(f"dtr:{{{stored.job}}}:skips:numbers") == 1


def test_a_skip_outlives_redis_though_no_checkpoint_knows_of_it(
    stored: Settings, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Skipped after the last save, then Redis is emptied: the store has it, `dtr data show` tells without Redis, a rebuild puts it back."""
    log, where = tmp_path / "log", ["--url", stored.redis_url, "--job", stored.job, "--json"]
    with uploading(stored):
        assert train(stored, log) == 0
    assert main(["data", "skip", "numbers", "part-3.jsonl:0-5", "--reason", "bad", *where]) == 0
    assert json.loads(capsys.readouterr().out)["in_store"] is True
    store.put("skips/numbers/torn.json", b"{")
    with redis.Redis.from_url(stored.redis_url) as raw:
        for key in raw.scan_iter(f"dtr:{{{stored.job}}}:*"):
            raw.delete(key)
    there = ["data", "show", "numbers", "--store", str(stored.store), *where]
    assert main(there) == 0
    assert [one["reason"] for one in json.loads(capsys.readouterr().out)["skipped"]] == ["bad"]
    assert main(["rebuild", "--from", str(stored.store), *where]) == 0
    with redis.Redis.from_url(stored.redis_url, decode_responses=True) as raw:
        assert list(raw.hgetall(f"dtr:{{{stored.job}}}:skips:numbers")) == ["part-3.jsonl:0-5"]


def test_a_store_that_is_away_does_not_stand_against_a_skip(stored: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Redis has it, and it is said that the store has not: without one, and for a folder that is not the one of the job's runs."""
    words = ["data", "skip", "numbers", "part-1.jsonl:3-7", "--reason", "bad", "--url", stored.redis_url, "--job", stored.job]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["new"], shown["in_store"], shown["note"]) == (True, False, "no store is known")
    with uploading(stored):
        assert train(stored, tmp_path / "log") == 0
    assert main([*words, "--store", str(tmp_path / "other")]) == 0
    assert "only Redis has it on record" in capsys.readouterr().out
    assert not (tmp_path / "other" / stored.job / "skips").exists()


def test_after_a_rebuild_the_lineage_tells(stored: Settings, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Redis emptied and filled by `dtr rebuild`: data set, skips and lineage are known again, and `which` goes by the store."""
    log, where = tmp_path / "log", ["--url", stored.redis_url, "--job", stored.job, "--json"]
    assert main(["data", "skip", "numbers", "part-3.jsonl:0-5", "--reason", "bad", *where]) == 0
    with uploading(stored):
        assert train(stored, log) == 0
    with redis.Redis.from_url(stored.redis_url) as raw:
        for key in raw.scan_iter(f"dtr:{{{stored.job}}}:*"):
            raw.delete(key)
    for _ in range(2):
        assert main(["rebuild", "--from", str(stored.store), *where]) == 0
    capsys.readouterr()
    assert main(["data", "which", "--step", "5", "--store", str(stored.store), *where]) == 0
    found = json.loads(capsys.readouterr().out)
    (batch,) = found["batches"]
    assert (found["source"], found["on_lineage"]) == ("store", True)
    assert {30 * int(f["file"][5]) + at for f in batch["files"] for at in range(f["start"], f["stop"])} == set(logged(log)[found["run"], 5])
    assert main(["data", "show", "numbers", "--store", str(stored.store), *where]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["registered"], shown["version"], [one["reason"] for one in shown["skipped"]]) == (True, 1, ["bad"])
    assert Counter(i for ids_of in logged(log).values() for i in ids_of) == Counter(set(range(SAMPLES)) - set(range(90, 95)))
