"""A rank is killed at each point of a collective restore: the others are told, all restore together in the next run, nothing is torn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.checkpoint.manager import CheckpointManager
from dtr.config import Settings
from dtr.state.job import JobState
from tests.ranks import running
from tests.uploading import uploading
from tests.waiting import eventually

FAILPOINTS = [
    "restore.after_offer",
    "restore.before_vote",
    "restore.after_vote",
    "restore.before_record",
    "restore.after_record",
    "restore.after_base",
]

# A trainer as a user would write it: restore, one step, save, wait until that is durable.
TRAINER = """
import sys
from dtr.errors import CheckpointAborted, RosterChanged
from worker_agent import Agent
rank, url, job, store, staging = int(sys.argv[1]), *sys.argv[2:]
with Agent(f"w{rank}", url, 2, rank, job=job, store=store, staging=staging, ttl_s=3.0, beat_interval_s=0.2) as agent:
    while True:
        try:
            found = agent.restore()
            assert found.state == {"rank": agent.rank}, found.state
            print("restored", agent.run, found.run, found.step, flush=True)
            handle = agent.save_async({"rank": agent.rank}, agent.step())
            print("saved", handle.durable.result(60).run, handle.step, flush=True)
            break
        except (CheckpointAborted, RosterChanged) as change:
            print("changed", change.run, flush=True)
            agent.form()
"""


class Ranks:
    """Two trainers; whoever is killed is started again, as a launcher would."""

    def __init__(self, settings: Settings, store: Path, fault: str) -> None:
        self.words = [settings.redis_url, settings.job, str(store), settings.staging]
        self.env = {**os.environ, "DTR_TESTING": "1", "DTR_FAILPOINT": fault}
        self.children = [self._start(rank) for rank in (0, 1)]
        self.killed: list[int] = []
        self.said: list[str] = ["", ""]

    def _start(self, rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", TRAINER, str(rank), *self.words]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ended(self) -> bool:
        """Whether both ended well; restarts the one that was killed."""
        codes = [child.poll() for child in self.children]
        for rank, code in enumerate(codes):
            child = self.children[rank]
            if code == -signal.SIGKILL:
                self.said[rank] += child.communicate()[0]
                self.killed.append(rank)
                self.children[rank] = self._start(rank)
            else:
                assert code in {None, 0}, child.communicate()[1]
        return codes == [0, 0]

    def output(self) -> list[list[str]]:
        for rank, child in enumerate(self.children):
            self.said[rank] += child.communicate()[0]
        return [text.splitlines() for text in self.said]

    def close(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.communicate()


@pytest.fixture
def store(settings: Settings, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of two ranks at step 4, and an uploader."""
    folder = tmp_path / "store"
    with uploading(settings):
        with running(settings, folder, 2) as job:
            job.commit(lambda r: {"rank": r.rank}, 4)
        yield folder


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_kill_in_mid_restore(settings: Settings, store: Path, tmp_path: Path, failpoint: str) -> None:
    """Whoever is killed where: afterwards both ranks are in one run that continues step 4, and step 5 is the newest of one lineage."""
    ranks = Ranks(settings, store, f"{failpoint}=kill@{tmp_path}/killed")
    try:
        eventually(ranks.ended, timeout_s=60, what="the end of both trainers")
        assert len(ranks.killed) == 1, "the failpoint was met once"
        said = ranks.output()
    finally:
        ranks.close()
    survivor = said[1 - ranks.killed[0]]
    assert any(line.startswith("changed") for line in survivor), survivor
    last = [next(line for line in reversed(lines) if line.startswith("restored")).split() for lines in said]
    assert last[0] == last[1]
    run, base, step = last[0][1:]
    assert step == "4"
    assert [lines[-1] for lines in said] == [f"saved {run} 5"] * 2
    with CheckpointManager(store, settings=settings, rank=0, world_size=2) as reader:
        assert [(x.run, x.step) for x in reader.list() if x.state == "COMMITTED"] == [(run, 5), (base, 4)]
        assert reader.lineage() == [(base, 4)]
        state = JobState(settings.redis_url, settings.job)
        assert state.redis.hgetall(state.keys.lineage) == {run: "", base: "4"}
        for key in state.redis.scan_iter(f"{state.keys.prefix}*"):
            state.redis.delete(key)
        state.close()
        assert reader.lineage() == [(base, 4)], "the store alone tells the same"
