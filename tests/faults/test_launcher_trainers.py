"""Trainers die, hang and are stopped under a living launcher."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from dtr.state.keys import Keys
from tests.launched import SHORT_TIMES, Launcher, launching
from tests.servers import RedisServer
from tests.waiting import eventually

Launch = Callable[..., Launcher]


@pytest.fixture
def launch(valkey: RedisServer, job: str, tmp_path: Path) -> Iterator[Launch]:
    """Starts launchers of one job with a ttl of 1.5 s."""
    with launching(valkey, job, tmp_path, **SHORT_TIMES) as start:
        yield start


@pytest.fixture
def departed(raw: redis.Redis, job: str) -> Callable[[], list[tuple[int, str]]]:
    """Who departed so far: when, by the server's clock in ms, and why."""

    def look() -> list[tuple[int, str]]:
        found: Any = raw.xrange(Keys(job).events)
        return [(int(at.split("-")[0]), fields["reason"]) for at, fields in found if fields["event"] == "departed"]

    return look


def phase(raw: redis.Redis, job: str, worker: str) -> str:
    return str(raw.hget(Keys(job).worker(worker), "phase"))


def test_a_killed_trainer_is_reported_at_once_with_its_signal(
    launch: Launch, departed: Callable[[], list[tuple[int, str]]], record_property: Callable[[str, object], None]
) -> None:
    """SIGKILL: Redis has the departure with the signal's name long before any ttl (5 minutes here); the time is measured."""
    launcher = launch("-n", "4", "--max-restarts", "9", DTR_TTL_S="300")
    delays_ms = []
    for count in range(1, 6):
        victim = launcher.wait_for("formed", rank=count % 4, count=(count + 3) // 4)
        eventually(lambda n=count: len([s for s in launcher.said() if s["event"] == "formed"]) >= 4 * n, what="a whole run")
        killed_at = time.time() * 1000
        os.kill(victim["pid"], signal.SIGKILL)
        at, reason = eventually(lambda n=count: departed()[n - 1 :], what="the departure")[0]
        assert reason == "signal 9 (SIGKILL)"
        delays_ms.append(at - killed_at)
    record_property("exit_to_departure_ms", delays_ms)
    print("exit to departure, ms:", [round(ms, 1) for ms in delays_ms])
    assert min(delays_ms) < 1000, delays_ms


def test_a_trainer_that_holds_the_gil_is_not_taken_for_dead(
    launch: Launch, departed: Callable[[], list[tuple[int, str]]], raw: redis.Redis, job: str
) -> None:
    """C code holds the GIL for three ttls: the launcher beats on, the run goes on, nobody departs."""
    launcher = launch("-n", "2")
    run = launcher.wait_for("formed", count=2)["run"]
    (launcher.folder / "hold-gil-1").write_text("4.5")
    worker = launcher.wait_for("holding", rank=1)["worker"]
    beats = set()

    def held() -> bool:
        beats.add(raw.hget(Keys(job).worker(worker), "beat_at"))
        return any(line["event"] == "held" for line in launcher.said(1))

    eventually(held, what="the end of the C code")
    assert len(beats) > 5, "nobody beat meanwhile"
    assert departed() == []
    assert raw.hget(Keys(job).meta, "run") == run
    launcher.stop_trainers()
    assert launcher.wait() == 0


def test_a_stopped_trainer_is_stalled_not_dead(
    launch: Launch, departed: Callable[[], list[tuple[int, str]]], raw: redis.Redis, job: str
) -> None:
    """SIGSTOP for three ttls: shown as stalled, told once, no departure; after SIGCONT it goes on in the same run."""
    launcher = launch("-n", "2")
    run = launcher.wait_for("formed", count=2)["run"]
    victim = launcher.wait_for("formed", rank=1)
    os.kill(victim["pid"], signal.SIGSTOP)
    eventually(lambda: phase(raw, job, victim["worker"]) == "stalled", what="phase stalled")
    until = time.monotonic() + 4.5
    eventually(lambda: time.monotonic() > until, what="three ttls")
    assert departed() == []
    assert raw.zscore(Keys(job).members, victim["worker"]) is not None
    os.kill(victim["pid"], signal.SIGCONT)
    eventually(lambda: phase(raw, job, victim["worker"]) != "stalled", what="that it goes on")
    launcher.stop_trainers()
    assert launcher.wait() == 0
    assert launcher.err.count("is stalled") == 1
    assert "goes on" in launcher.err
    told = [fields for _, fields in raw.xrange(Keys(job).events) if fields["event"] in {"stalled", "resumed"}]
    assert [(fields["event"], fields["worker"]) for fields in told] == [("stalled", victim["worker"]), ("resumed", victim["worker"])]
    assert "SIGSTOP" in told[0]["reason"]
    assert int(told[1]["after_ms"]) > 3000
    assert raw.hget(Keys(job).meta, "last_run") == run


def test_a_stalled_trainer_is_killed_by_choice_and_starts_again(launch: Launch, departed: Callable[[], list[tuple[int, str]]]) -> None:
    """--stall-action kill: after --stall-timeout without progress, with the reason on record; its restart works."""
    launcher = launch("-n", "2", "--stall-timeout", "1", "--stall-action", "kill", "--max-restarts", "1")
    launcher.wait_for("formed", count=2)
    os.kill(launcher.wait_for("formed", rank=1)["pid"], signal.SIGSTOP)
    launcher.wait_for("formed", rank=1, restarts=1)
    reason = departed()[0][1]
    assert reason.startswith("signal 9 (SIGKILL): stalled at step ")
    assert "killed by the launcher" in reason
    launcher.stop_trainers()
    assert launcher.wait() == 0


def test_a_trainer_that_was_replaced_is_not_started_again(
    launch: Launch, make_session: Callable[..., Any], departed: Callable[[], list[tuple[int, str]]]
) -> None:
    """Another process registers under its name: it is told so, ends, and the launcher does not fight for the name."""
    launcher = launch("-n", "1", "--max-restarts", "9")
    worker = launcher.wait_for("formed")["worker"]
    session = make_session(worker).start()
    assert "takeover" in launcher.wait_for("stale")["reason"]
    assert launcher.wait() == 3
    assert "another process has registered under its name" in launcher.err
    assert len(departed()) == 1
    session.check()
