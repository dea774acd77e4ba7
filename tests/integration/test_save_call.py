"""The call of ``save_async`` itself: what it does in the trainer's thread, and what it leaves to others."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr import counters
from dtr.checkpoint.manager import CheckpointManager
from dtr.checkpoint.staging.slots import scan
from dtr.config import Settings
from dtr.errors import NoFreeSlot
from dtr.state.job import JobState
from tests.ranks import running
from tests.servers import RedisServer
from tests.uploading import uploading
from tests.waiting import eventually

WITHIN_S = 30


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each thread sent to a socket or waited for one, by its id."""
    seen: Counter[int] = Counter()
    for name in ("connect", "send", "sendall", "sendmsg", "sendto", "recv", "recv_into", "recvmsg"):
        real = getattr(socket.socket, name)

        def counted(self: Any, *arguments: Any, real: Any = real, **options: Any) -> Any:
            seen[threading.get_ident()] += 1
            return real(self, *arguments, **options)

        monkeypatch.setattr(socket.socket, name, counted)
    return seen


def state_of(step: int) -> dict[str, Any]:
    return {"w": np.full(100_000, step, np.float32), "small": [np.full(10, step)] * 3, "step": step}


def test_a_save_costs_no_round_trip(settings: Settings, tmp_path: Path, traffic: Counter[int]) -> None:
    """From the second save on, the trainer's thread neither sends to Redis or the store nor waits for them; the checkpoints commit."""
    me = threading.get_ident()
    with uploading(settings), running(settings, tmp_path / "store", 1) as job:
        manager = job.ranks[0].manager
        manager.save_async(state_of(0), 0).durable.result(WITHIN_S)
        assert traffic[me], "the first save of a run fixes what it continues"
        for step in range(1, 6):
            before = traffic[me]
            handle = manager.save_async(state_of(step), step, metrics={"loss": 1.0 / step})
            assert traffic[me] == before
            assert handle.staged.done()
            assert handle.durable.result(WITHIN_S).step == step
        assert sum(traffic.values()) > traffic[me], "others did"


def test_a_save_needs_no_redis(own_valkey: RedisServer, settings: Settings, tmp_path: Path) -> None:
    """Redis is stopped in its tracks: whoever asks it gets no answer. Saves are staged all the same, and commit when it goes on."""
    here = replace(settings, redis_url=own_valkey.url, slots=4, ttl_s=60.0)
    with uploading(here), running(here, tmp_path / "store", 1) as job:
        manager = job.ranks[0].manager
        manager.save_async(state_of(0), 0).durable.result(WITHIN_S)
        os.kill(own_valkey.process.pid, signal.SIGSTOP)
        try:
            handles = [manager.save_async(state_of(step), step) for step in (1, 2, 3)]
            assert [handle.staged.done() for handle in handles] == [True] * 3
            assert not any(handle.durable.done() for handle in handles)
        finally:
            os.kill(own_valkey.process.pid, signal.SIGCONT)
        assert [handle.durable.result(WITHIN_S).step for handle in handles] == [1, 2, 3]


def test_what_the_policy_did_is_counted(settings: Settings, tmp_path: Path) -> None:
    """wait, skip and fail: each leaves its count for `dtr status`."""
    here = replace(settings, job=f"{settings.job}-wait", slot_wait_s=WITHIN_S)
    with CheckpointManager(tmp_path / "wait", settings=here) as manager, state_of_job(here) as state, contextlib.ExitStack() as stack:
        for step in (0, 1):
            manager.save_async(state_of(step), step)
        late = threading.Timer(0.1, lambda: stack.enter_context(uploading(here)))
        late.start()
        handle = manager.save_async(state_of(2), 2)  # until the uploader that is yet to come has freed a slot
        late.join()
        assert handle.durable.result(WITHIN_S).step == 2
        eventually(lambda: counters.read(state).get("saves_waited") == 1, what="saves_waited")
    for policy, counter in (("skip", "saves_skipped"), ("fail", "saves_failed")):
        here = replace(settings, slot_policy=policy, job=f"{settings.job}-{policy}")
        with CheckpointManager(tmp_path / policy, settings=here) as manager, state_of_job(here) as state:
            for step in (0, 1):
                manager.save_async(state_of(step), step)
            if policy == "skip":
                assert manager.save_async(state_of(2), 2).state == "SKIPPED"
            else:
                with pytest.raises(NoFreeSlot, match=r"slot 0 holds run .* step 0 \(STAGED\); slot 1 holds run .* step 1"):
                    manager.save_async(state_of(2), 2)
            eventually(lambda: counters.read(state).get(counter) == 1, what=counter)  # noqa: B023
    assert [found.kind for found in scan(settings.staging)].count("COPYING") == 0


def state_of_job(settings: Settings) -> contextlib.closing[JobState]:
    return contextlib.closing(JobState(settings.redis_url, settings.job, name="test"))


def test_ties_survive_a_checkpoint(settings: Settings, tmp_path: Path) -> None:
    """From save_async to restore: stored once, and one memory again."""
    w = np.arange(50_000.0)
    with uploading(settings), CheckpointManager(tmp_path / "store", settings=settings) as manager:
        commit = manager.save_async({"embed": w, "head": w, "row": w[10:20]}, 1).durable.result(WITHIN_S)
        assert commit.size_bytes < 1.5 * w.nbytes
        found = manager.restore()
    assert found is not None
    back = found.state
    back["embed"][:] = 3
    assert back["head"].tolist() == [3.0] * 50_000
    assert back["row"].tolist() == [3.0] * 10


@pytest.mark.parametrize("tied", [False, True])
def test_ties_fill_a_state_that_is_there(settings: Settings, tmp_path: Path, tied: bool) -> None:
    """Restored in place, whether or not the names are tied there as well; a part of them alone; and windows that nobody spans."""
    w = np.arange(50_000.0)
    saved = {"embed": w, "head": w, "row": w[10:20], "a": w[:300][1:200], "windows": [v := np.arange(90.0), v[5:60]]}
    with uploading(settings), CheckpointManager(tmp_path / "store", settings=settings) as manager:
        manager.save_async(saved, 1).durable.result(WITHIN_S)
        other = np.zeros(50_000)
        into = {
            "embed": other, "head": other if tied else np.zeros(50_000), "row": other[10:20] if tied else np.zeros(10),
            "a": np.zeros(199), "windows": [np.zeros(90), np.zeros(55)],
        }  # fmt: skip
        found = manager.restore(into=into)
        part = manager.restore(only="row")
    assert found is not None
    assert part is not None
    for state in (into, found.state):
        for name in ("embed", "head", "row", "a"):
            assert np.array_equal(state[name], saved[name]), name
        assert np.array_equal(state["windows"][1], saved["windows"][1])
    assert into["embed"] is other
    assert part.state["row"].tolist() == list(range(10, 20))
