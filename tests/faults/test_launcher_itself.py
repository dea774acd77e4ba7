"""The launcher is stopped or killed, or Redis goes away under it; and the small process that beats without one."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from dtr.config import Settings
from dtr.launcherlink import registration
from dtr.membership import Identity, join, new_incarnation, open_state
from dtr.progress import ProgressPage
from dtr.session import Session
from dtr.state.job import JobState
from dtr.state.keys import Keys
from tests.launched import ROOT, SHORT_TIMES, Launcher, launching
from tests.servers import RedisServer, valkey_server
from tests.waiting import eventually

Launch = Callable[..., Launcher]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that keeps every write over a restart."""
    with valkey_server(tmp_path / "server", args=("--appendonly", "yes", "--appendfsync", "always")) as found:
        yield found


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True) as found:
        yield found


@pytest.fixture
def launch(server: RedisServer, job: str, tmp_path: Path) -> Iterator[Launch]:
    """Starts launchers of one job with a ttl of 1.5 s."""
    with launching(server, job, tmp_path, **SHORT_TIMES) as start:
        yield start


def reasons(client: redis.Redis, job: str) -> list[str]:
    found: Any = client.xrange(Keys(job).events)
    return [fields["reason"] for _, fields in found if fields["event"] == "departed"]


def beats(client: redis.Redis, job: str, worker: str) -> str | None:
    return client.hget(Keys(job).worker(worker), "beat_at")


def test_launcher_and_trainer_stopped_together_are_dead_and_learn_it(
    launch: Launch, server: RedisServer, client: redis.Redis, job: str, tmp_path: Path
) -> None:
    """SIGSTOP of both for three ttls: another member reaps them; after SIGCONT the launcher's next beat is refused and the trainer hears
    StaleIncarnation; nothing that it does counts; a restart brings it back as a new incarnation."""
    settings = Settings.load(environ={}, redis_url=server.url, job=job, staging=str(tmp_path / "staging"), ttl_s=1.5, beat_interval_s=0.3)
    watcher = Session(settings, worker_id="watcher").start()
    launcher = launch("-n", "1", "--max-restarts", "1")
    victim = launcher.wait_for("formed")
    for pid in (launcher.process.pid, victim["pid"]):
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: client.hget(Keys(job).departed, victim["worker"]), what="the reap")
    until = time.monotonic() + 4.5
    eventually(lambda: time.monotonic() > until, what="three ttls")
    for pid in (victim["pid"], launcher.process.pid):
        os.kill(pid, signal.SIGCONT)
    assert "no beat within its ttl" in launcher.wait_for("stale")["reason"]
    assert client.hget(Keys(job).fences, victim["worker"]) != victim["incarnation"]
    assert launcher.wait_for("formed", restarts=1)["incarnation"] != victim["incarnation"]
    assert reasons(client, job) == ["no beat within its ttl"]
    watcher.close()


def test_trainers_outlive_a_killed_launcher(launch: Launch, client: redis.Redis, job: str) -> None:
    """SIGKILL of the launcher: the trainers beat for themselves, nobody is taken for dead, and their output goes on to the end."""
    launcher = launch("-n", "2")
    launcher.wait_for("formed", count=2)
    worker = launcher.wait_for("formed", rank=1)["worker"]
    launcher.signal(signal.SIGKILL)
    launcher.process.wait()
    last = beats(client, job, worker)
    until = time.monotonic() + 3.0
    eventually(lambda: time.monotonic() > until and beats(client, job, worker) not in {None, last}, what="beats of the trainer itself")
    assert reasons(client, job) == []
    launcher.stop_trainers()
    eventually(lambda: [line["event"] for line in launcher.said()].count("done") == 2, what="an orderly end")
    eventually(lambda: launcher.left() == [], what="the end of the trainers and of what labelled their output")
    assert "has gone" in launcher.err
    assert "Traceback" not in launcher.err


def test_redis_restarts_under_the_launcher(launch: Launch, server: RedisServer, client: redis.Redis, job: str) -> None:
    """Redis is away for two ttls, and one trainer dies meanwhile: the exit is seen at once and told when Redis is back; the other
    one is not taken for dead; the two form again."""
    launcher = launch("-n", "2", "--max-restarts", "20")
    launcher.wait_for("formed", count=2)
    victim, other = (launcher.wait_for("formed", rank=rank) for rank in (1, 0))
    server.kill()
    os.kill(victim["pid"], signal.SIGKILL)
    eventually(lambda: "was killed by signal 9" in launcher.err, what="that the exit is seen without Redis")
    until = time.monotonic() + 3.0
    eventually(lambda: time.monotonic() > until, what="two ttls")
    server.start()
    eventually(lambda: "signal 9 (SIGKILL)" in reasons(client, job), what="the departure")
    eventually(lambda: len({line["run"] for line in launcher.said(0) if line["event"] == "formed"}) > 1, what="the next run")
    assert client.hget(Keys(job).fences, other["worker"]) == other["incarnation"]
    launcher.stop_trainers()
    assert launcher.wait() == 0


def test_an_output_that_does_not_flow_holds_nothing_back(launch: Launch, client: redis.Redis, job: str) -> None:
    """stderr is a full pipe that nobody reads: exits are seen and told, restarts are made; when it is read, no line is missing."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 512)
    os.set_blocking(writer, True)
    launcher = launch("--max-restarts", "9", stderr=writer, DTR_TTL_S="300")
    os.close(writer)
    for count in range(3):
        os.kill(launcher.wait_for("formed", restarts=count)["pid"], signal.SIGKILL)
    eventually(lambda: len(reasons(client, job)) == 3, what="three departures")
    launcher.wait_for("formed", restarts=3)
    launcher.stop_trainers()
    eventually(lambda: launcher.said()[-1]["event"] == "done", what="the end of the trainer")
    with os.fdopen(reader, "rb") as file:
        lines = file.read().lstrip(b".").decode().splitlines()
    assert launcher.wait() == 0
    assert [n for n in range(1, 10) if any(f"(restart {n} of 9)" in line for line in lines)] == [1, 2, 3]


def test_64_descriptors_are_enough_for_four_trainers(launch: Launch) -> None:
    """What the launcher says it needs is what it needs, restarts included."""
    launcher = launch("-n", "4", "--max-restarts", "4")
    resource.prlimit(launcher.process.pid, resource.RLIMIT_NOFILE, (64, 64))
    launcher.wait_for("formed", count=4)
    os.kill(launcher.wait_for("formed", rank=3)["pid"], signal.SIGKILL)
    launcher.wait_for("formed", rank=3, restarts=1)
    launcher.stop_trainers()
    assert launcher.wait() == 0, launcher.err
    assert "Too many open files" not in launcher.err


def test_an_emptied_redis_makes_trainers_register_again(launch: Launch, client: redis.Redis, job: str) -> None:
    """FLUSHALL: the launcher's beats learn it and pass it on; both register anew over the same connection, and are beaten for."""
    launcher = launch("-n", "2")
    launcher.wait_for("formed", count=2)
    before = {line["incarnation"] for line in launcher.said() if line["event"] == "formed"}
    client.flushall()
    eventually(lambda: len([s for s in launcher.said() if s["event"] == "formed"]) >= 4, what="the next run")
    after = {launcher.wait_for("formed", rank=rank, count=2)["incarnation"] for rank in range(2)}
    assert not before & after
    worker = launcher.wait_for("formed", rank=0)["worker"]
    seen = {beats(client, job, worker)}
    eventually(lambda: seen.add(beats(client, job, worker)) or len(seen) > 3, what="beats for the new registration")
    launcher.stop_trainers()
    assert launcher.wait() == 0
    assert "beats for itself" not in launcher.err


class Member:
    """A registered member in this process, with a page, and with `python -m worker_agent beat` on a socket."""

    def __init__(self, server: RedisServer, job: str, tmp_path: Path) -> None:
        self.state = JobState(server.url, job, name="test")
        self.who = Identity(state_id=open_state(self.state), worker_id="w-0", incarnation=new_incarnation(), host="h", pid=os.getpid())
        join(self.state, self.who, ttl_ms=1500)
        self.page = ProgressPage(str(tmp_path / "page"))
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(30)
        self.lines = self.socket.makefile("rb")
        with theirs:
            self.beater = subprocess.Popen(
                [sys.executable, "-m", "worker_agent", "beat"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                cwd=ROOT,
                start_new_session=True,
            )

    def say(self, line: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(line).encode() + b"\n")

    def register(self) -> None:
        self.say(
            registration(
                self.who, redis_url=self.state.url, job=self.state.job, ttl_ms=1500, interval_ms=200, number=0, page=str(self.page.path)
            )
        )

    def hear(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.lines.readline())
        return found

    def close(self) -> None:
        self.lines.close()
        self.socket.close()
        self.page.close()
        self.state.close()
        self.beater.kill()
        self.beater.wait()


@pytest.fixture
def member(server: RedisServer, job: str, tmp_path: Path) -> Iterator[Member]:
    found = Member(server, job, tmp_path)
    yield found
    found.close()


def test_the_beating_process_beats_until_its_stdin_ends(member: Member, client: redis.Redis, job: str) -> None:
    """It answers, shows the page's step, shrugs off what a terminal sends to all, and ends when the trainer does."""
    member.register()
    assert member.hear() == {"ok": True}
    member.page.write(7, "training")
    eventually(lambda: client.hget(Keys(job).worker("w-0"), "step") == "7", what="the step")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.killpg(member.beater.pid, number)
    member.page.write(8, "training")
    eventually(lambda: client.hget(Keys(job).worker("w-0"), "step") == "8", what="the next step")
    member.socket.shutdown(socket.SHUT_WR)
    assert member.beater.wait(30) == 0


def test_the_beating_process_tells_what_the_beats_learn(member: Member) -> None:
    """A line that is wrong is refused by name; one that was taken over hears so; leaving ends the process."""
    member.say({"v": 1, "job": "a b"})
    refused = member.hear()
    assert refused["ok"] is False
    assert "redis_url" in refused["error"]
    member.register()
    assert member.hear() == {"ok": True}
    newer = Identity(state_id=member.who.state_id, worker_id="w-0", incarnation=new_incarnation(), host="h", pid=1)
    join(member.state, newer, ttl_ms=1500)
    news = member.hear()
    assert news["news"] == "stale"
    assert "w-0" in news["detail"]
    member.say({"leave": True})
    assert member.beater.wait(30) == 0
