"""Trainers and Redis are killed, stopped, emptied and paused under running jobs of real processes (no launcher)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from dtr.session import Session
from dtr.state.keys import Keys
from tests.servers import RedisServer, valkey_server
from tests.trainer import ROOT, Trainer
from tests.waiting import eventually

Start = Callable[..., Trainer]


@pytest.fixture
def start(job: str, tmp_path: Path, own_valkey: RedisServer) -> Iterator[Start]:
    """Starts trainers of one job on a server that the test may break."""
    running: list[Trainer] = []

    def make(worker: str, rank: int | str, low: int, high: int, *, url: str = own_valkey.url, steps: int = 1_000_000) -> Trainer:
        trainer = Trainer(url, job, str(tmp_path / "staging"), worker, str(rank), str(low), str(high), str(steps))
        running.append(trainer)
        return trainer

    yield make
    for trainer in running:
        trainer.end()


def test_a_killed_trainer_breaks_the_barrier_with_its_name_and_the_others_go_on(start: Start) -> None:
    """SIGKILL of rank 2 of 3: both survivors hear the same verdict, form a run of two without it, and go on."""
    trainers = [start(f"w{rank}", rank, 2, 3) for rank in range(3)]
    for trainer in trainers:
        trainer.progress()
    trainers[2].signal(signal.SIGKILL)
    verdicts = [trainer.wait_for("broken") for trainer in trainers[:2]]
    assert verdicts[0]["reason"] == verdicts[1]["reason"] == "rank 2 (w2) departed: no beat within its ttl"
    assert all("w2" in verdict["missing"] for verdict in verdicts)
    runs = {trainer.wait_for("formed", lambda s: s["world_size"] == 2)["run"] for trainer in trainers[:2]}
    assert len(runs) == 1
    for trainer in trainers[:2]:
        trainer.progress()


def test_a_newcomer_makes_every_rank_form_in_the_same_round(start: Start) -> None:
    """A third joins a running pair: both leave their run at the same step, and the three go on together."""
    pair = [start(f"w{rank}", rank, 2, 3) for rank in range(2)]
    for trainer in pair:
        trainer.progress()
    third = start("w2", 2, 2, 3)
    last_steps = []
    for trainer in pair:
        trainer.wait_for("changed", lambda s: "newcomer" in s["reason"])
        position = next(i for i, s in enumerate(trainer.said) if s["event"] == "changed")
        last_steps.append(trainer.said[position - 1]["step"])
    assert last_steps[0] == last_steps[1]
    for trainer in (*pair, third):
        trainer.wait_for("formed", lambda s: s["world_size"] == 3)
        trainer.progress()


def test_a_stopped_trainer_that_wakes_after_its_ttl_is_refused(start: Start) -> None:
    """SIGSTOP for longer than the ttl, then SIGCONT: the zombie ends with StaleIncarnation, the others never see it again."""
    trainers = [start(f"w{rank}", rank, 1, 2) for rank in range(2)]
    for trainer in trainers:
        trainer.progress()
    trainers[1].signal(signal.SIGSTOP)
    trainers[0].wait_for("formed", lambda s: s["world_size"] == 1)
    trainers[0].progress()
    trainers[1].signal(signal.SIGCONT)
    assert "w1" in trainers[1].wait_for("stale")["reason"]
    assert trainers[1].process.wait(timeout=30) == 3
    trainers[0].progress()
    assert trainers[0].said[-1]["run"] == trainers[0].wait_for("formed", lambda s: s["world_size"] == 1)["run"]


def test_the_newest_of_two_processes_with_one_worker_id_wins(start: Start) -> None:
    """The older gets StaleIncarnation that names the takeover; the newer trains."""
    older = start("same", 0, 1, 1)
    older.progress()
    newer = start("same", 0, 1, 1)
    newer.progress()
    assert "takeover" in older.wait_for("stale")["reason"]
    assert older.process.wait(timeout=30) == 3
    newer.progress()


@pytest.fixture
def durable_valkey(tmp_path: Path) -> Iterator[RedisServer]:
    """A server with an append-only file, as `dtr up` starts it."""
    with valkey_server(tmp_path / "durable", args=["--appendonly", "yes", "--appendfsync", "everysec"]) as server:
        yield server


def test_redis_killed_and_restarted_with_its_log_in_mid_barrier(start: Start, durable_valkey: RedisServer, job: str) -> None:
    """SIGKILL of the server under a running pair, restart from the append-only file: the pair goes on, and nobody was taken for dead."""
    pair = [start(f"w{rank}", rank, 2, 2, url=durable_valkey.url) for rank in range(2)]
    for trainer in pair:
        trainer.progress()
    durable_valkey.kill()
    durable_valkey.start()
    for trainer in pair:
        trainer.progress()
    with redis.Redis.from_url(durable_valkey.url, decode_responses=True) as client:
        assert client.hlen(Keys(job).departed) == 0
    assert len({said["run"] for trainer in pair for said in trainer.steps}) == 1


def test_redis_that_lost_its_last_writes_is_noticed(start: Start, durable_valkey: RedisServer) -> None:
    """The last bytes of the append-only file are cut off before the restart: the members register again, and go on together."""
    pair = [start(f"w{rank}", rank, 2, 2, url=durable_valkey.url) for rank in range(2)]
    for trainer in pair:
        trainer.progress()
    log = max((durable_valkey.dir / "appendonlydir").glob("*.incr.aof"))
    eventually(lambda: len(pair[0].steps) > 60, what="60 steps")
    durable_valkey.kill()
    os.truncate(log, log.stat().st_size * 2 // 3)
    durable_valkey.start()
    runs = {trainer.wait_for("formed", lambda s: s["run"].startswith("0002"))["run"] for trainer in pair}
    assert len(runs) == 1
    for trainer in pair:
        trainer.progress()


def test_an_emptied_redis_under_a_running_job(start: Start, own_valkey: RedisServer) -> None:
    """FLUSHALL: both members register again by themselves, form a new run, and go on."""
    pair = [start(f"w{rank}", rank, 2, 2) for rank in range(2)]
    for trainer in pair:
        trainer.progress()
    first = pair[0].wait_for("formed")["run"]
    with redis.Redis.from_url(own_valkey.url) as client:
        client.flushall()
    runs = {trainer.wait_for("formed", lambda s: s["run"] != first)["run"] for trainer in pair}
    assert len(runs) == 1
    for trainer in pair:
        trainer.progress()


def test_a_pause_of_redis_longer_than_the_ttl_kills_nobody(start: Start, own_valkey: RedisServer, job: str) -> None:
    """CLIENT PAUSE for 10 s with a ttl of 1.5 s: no departure is recorded, and the same run goes on."""
    pair = [start(f"w{rank}", rank, 2, 2) for rank in range(2)]
    for trainer in pair:
        trainer.progress()
    run = pair[0].wait_for("formed")["run"]
    with redis.Redis.from_url(own_valkey.url, decode_responses=True, socket_timeout=60) as client:
        client.client_pause(10_000)
        for trainer in pair:
            trainer.progress()
        assert client.hlen(Keys(job).departed) == 0
    assert {trainer.said[-1]["run"] for trainer in pair} == {run}


def test_active_expiry_off_does_not_change_who_is_alive(start: Start, own_valkey: RedisServer) -> None:
    """Liveness is a deadline that scripts read, not a key that vanishes: a death is recorded without any expiry."""
    with redis.Redis.from_url(own_valkey.url) as client:
        client.execute_command("DEBUG", "SET-ACTIVE-EXPIRE", "0")
    pair = [start(f"w{rank}", rank, 1, 2) for rank in range(2)]
    for trainer in pair:
        trainer.progress()
    pair[1].signal(signal.SIGKILL)
    pair[0].wait_for("formed", lambda s: s["world_size"] == 1)
    pair[0].progress()


@pytest.mark.parametrize("place", ["join.before", "join.after", "form.before_arrive", "form.after_arrive"])
def test_killed_while_it_joins_or_forms(place: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies at any point of joining and forming holds nobody back for longer than its ttl, and its successor gets in."""
    monkeypatch.setenv("DTR_TESTING", "1")
    monkeypatch.setenv("DTR_FAILPOINT", f"{place}=kill")
    victim = start("w1", 1, 2, 2)
    assert victim.process.wait(timeout=60) == -signal.SIGKILL
    monkeypatch.delenv("DTR_FAILPOINT")
    pair = [start(f"w{rank}", rank, 2, 2) for rank in range(2)]
    for trainer in pair:
        trainer.progress()


FORK = """
import os, sys
from dtr.errors import ForkedProcess
from worker_agent import Agent
url, job, staging = sys.argv[1:]
with Agent("w", url, 1, 0, job=job, staging=staging) as agent:
    for _ in range(20):
        agent.barrier("b")
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (lambda: agent.barrier("b"), agent.step, agent.form, lambda: agent.run):
            try:
                call()
            except ForkedProcess:
                refused += 1
        agent.close()
        os._exit(0 if refused == 4 else 1)
    for _ in range(200):
        agent.barrier("b")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child was not refused"
    for _ in range(20):
        agent.barrier("b")
"""


def test_a_forked_child_is_refused_and_crosses_no_replies(valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """os.fork after the start: the child gets a clear error from every call, and the parent's connections go on."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, valkey.url, job, str(tmp_path / "staging")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        reasons = [f["reason"] for _, f in client.xrange(Keys(job).events) if f["event"] == "departed"]
    assert reasons == ["left"]


def test_beats_of_a_child_process_go_on_while_c_code_holds_the_gil(
    valkey: RedisServer, job: str, tmp_path: Path, make_session: Callable[[str], Session]
) -> None:
    """beat="process": a trainer that holds the GIL for three ttls is not taken for dead."""
    code = (
        "import ctypes, sys\nfrom worker_agent import Agent\nurl, job, staging = sys.argv[1:]\n"
        "with Agent('w', url, 1, 0, job=job, staging=staging, ttl_s=1, beat_interval_s=0.2, beat='process') as agent:\n"
        "    ctypes.PyDLL(None).usleep(3_500_000)\n    agent.barrier('b')\n"
    )
    # Another member beats all the while: it would record the death.
    make_session("other").start()
    done = subprocess.run(
        [sys.executable, "-c", code, valkey.url, job, str(tmp_path / "staging")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        assert client.hget(Keys(job).departed, "w").endswith(" left")
