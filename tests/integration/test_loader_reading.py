"""Who reads for a loader: its thread, its processes, and processes of others; within bounds, and gone when they should be."""

from __future__ import annotations

import contextlib
import gzip
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr.config import Settings
from dtr.datasets.loading.batch import Batch, Order
from dtr.errors import ConfigError, DataConflict, DatasetMismatch, DataUnavailable, ForkedProcess, InvalidInput, StepUnknown
from tests.loading import LoadingRank, loading, once_each, registered
from tests.waiting import eventually
from worker_agent import Agent

ROOT = Path(__file__).resolve().parents[2]


numbers = pytest.fixture(registered)


def connections(rank: LoadingRank) -> int:
    return len([c for c in rank.session.state.redis.client_list() if rank.session.worker_id in c["name"]])


def train_on(rank: LoadingRank, batches: Any, steps: int | None = None) -> None:
    for n, batch in enumerate(batches):
        if n == steps:
            return
        rank.consume(batch)


# --- processes of the loader ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "processes", "tail"), [("fork", 2, "pad"), ("spawn", 1, "empty")])
def test_processes_read_what_the_trainer_leases(settings: Settings, numbers: Path, start: str, processes: int, tail: str) -> None:
    """Given two ranks with processes that read, when they train two epochs, then each sample came once, in equal steps."""
    with loading(settings, 2) as job:
        steps = job.train(batch_size=7, epochs=2, processes=processes, start=start, tail=tail)
        assert len(set(steps)) == 1
        for epoch in (0, 1):
            assert (set(job.seen(epoch)) if tail == "pad" else set(job.seen(epoch).elements())) == set(range(400))
            assert tail == "pad" or once_each(job.seen(epoch), range(400))
        assert job.merged()["numbers"]["done"] == "0-15"


def test_each_process_has_shards_of_its_own(settings: Settings, numbers: Path) -> None:
    """Given orders for two workers, then no shard has samples in orders of both, but at the end of the epoch."""
    with loading(settings, 1) as job:
        orders = list(job.ranks[0].loader(batch_size=5).orders(workers=2))
        early = orders[: 2 * len(orders) // 3]
        shards = [{shard for order in early[lane::2] for shard, _, _ in order.ranges} for lane in (0, 1)]
        assert shards[0] and shards[1] and not shards[0] & shards[1]


def test_a_process_that_dies_is_an_error(settings: Settings, numbers: Path) -> None:
    """Given a loader with a process, when that is killed, then the trainer is told, and does not wait for it."""
    eventually(lambda: not multiprocessing.active_children(), what="those of other tests to end")
    with loading(settings, 1) as job:
        loader = job.ranks[0].loader(processes=1, start="fork", prefetch=1)
        next(loader)
        (child,) = multiprocessing.active_children()
        os.kill(child.pid or 0, signal.SIGKILL)
        with pytest.raises(DataUnavailable, match="a process that reads"):
            list(loader)


def test_processes_end_with_the_loader_and_with_the_trainer(settings: Settings, numbers: Path) -> None:
    """Given processes that read, when the loader is closed, or the trainer is killed, then they end."""
    eventually(lambda: not multiprocessing.active_children(), what="those of other tests to end")
    with loading(settings, 1) as job:
        with job.ranks[0].loader(processes=2, start="fork") as loader:
            next(loader)
            assert len(multiprocessing.active_children()) == 2
        eventually(lambda: not multiprocessing.active_children(), what="the processes to end")
    code = f"""
import multiprocessing, os, signal
from tests.loading import Loading
from dtr.config import Settings
if __name__ == "__main__":
    settings = Settings.load(environ={{}}, redis_url={settings.redis_url!r}, job={settings.job!r}, staging={settings.staging!r})
    next(Loading(settings, 1).start().ranks[0].loader(processes=2, start="fork"))
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert out.returncode == -signal.SIGKILL, out.stderr
    pids = [int(pid) for pid in out.stdout.split()]
    assert len(pids) == 2
    eventually(lambda: not any(_lives(pid) for pid in pids), what="the orphans to end")


def _lives(pid: int) -> bool:
    """Whether it runs: a zombie, which only waits for its parent to look, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_readers_error_comes_whole(settings: Settings, numbers: Path) -> None:
    """Given a file that changed, or a column that is not there, when a process meets it, then the trainer has the same error."""
    with loading(settings, 1) as job:
        with pytest.raises(InvalidInput, match=r"no column 'idd'; it has id, x; did you mean 'id'\?") as caught:
            list(job.ranks[0].loader(processes=1, start="fork", columns=["idd"]))
        assert caught.value.field == "columns"
    for path in numbers.iterdir():
        path.write_text("{}\n")
    with loading(settings, 1, names="b") as job:
        job.ranks[0].plane.restored({})
        with pytest.raises(DatasetMismatch, match="changed since"):
            list(job.ranks[0].loader(processes=1, start="fork"))


# --- processes of others ----------------------------------------------------------------------------------------------------


def read_alone(reader: Callable[[Order], Batch], pipe: Any) -> None:
    """A worker that knows files only."""
    while (order := pipe.recv()) is not None:
        pipe.send(reader(order))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_whoever_reads_talks_to_nobody(settings: Settings, numbers: Path, start: str) -> None:
    """Given children started after the agent, when they read the orders of their parent, then it alone has connections, and all is once."""
    with loading(settings, 1) as job:
        rank = job.ranks[0]
        loader = rank.loader(batch_size=9, epochs=2)
        rank.consume(next(iter(map(loader.reader(), loader.orders(workers=2)))))
        before = connections(rank)
        context: Any = multiprocessing.get_context(start)
        pairs = [context.Pipe() for _ in range(2)]
        children = [context.Process(target=read_alone, args=(loader.reader(), far)) for _, far in pairs]
        for child in children:
            child.start()
        assert connections(rank) <= before
        for n, order in enumerate(loader.orders(workers=2)):
            pipe = pairs[n % 2][0]
            pipe.send(order)
            rank.consume(pipe.recv())
        for (near, _), child in zip(pairs, children, strict=True):
            near.send(None)
            child.join(30)
            assert child.exitcode == 0
        for epoch in (0, 1):
            assert once_each(job.seen(epoch), range(400))


def test_a_forked_child_may_not_draw(settings: Settings, numbers: Path) -> None:
    """Given a forked child, when it draws orders, or evaluates, then it is told to leave that to its parent."""
    with loading(settings, 1) as job:
        loader = job.ranks[0].loader()
        orders = loader.orders()
        next(iter(orders))
        child = os.fork()
        if child == 0:  # pragma: no cover - another process
            status = 1
            with contextlib.suppress(BaseException):
                try:
                    next(iter(orders))
                except ForkedProcess:
                    status = 0
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        train_on(job.ranks[0], map(loader.reader(), orders))
        assert once_each(job.seen(), range(400))


def test_orders_that_were_left_come_again(settings: Settings, numbers: Path) -> None:
    """Given orders drawn far ahead and left half-way, when they are iterated over anew, then each sample is consumed once."""
    with loading(settings, 1) as job:
        rank, loader = job.ranks[0], job.ranks[0].loader(batch_size=8)
        drawn = [order for order, _ in zip(loader.orders(), range(30), strict=False)]
        train_on(rank, map(loader.reader(), drawn[:4]))
        assert [order.number for order, _ in zip(loader.orders(), range(5), strict=False)] == [4, 5, 6, 7, 8]
        train_on(rank, map(loader.reader(), loader.orders()))
        assert once_each(job.seen(), range(400))


def test_a_cut_may_be_taken_however_far_ahead_orders_are_drawn(settings: Settings, numbers: Path) -> None:
    """Given orders drawn 30 ahead by two ranks, when their state is taken, then it has what was consumed and not what was drawn."""
    with loading(settings, 2, names="a") as job:

        def far_ahead(rank: LoadingRank) -> dict[str, Any]:
            loader = rank.loader(batch_size=5)
            drawn = [order for order, _ in zip(loader.orders(), range(30), strict=False)]
            train_on(rank, map(loader.reader(), drawn[:12]))
            return loader.state_dict()

        states, seen = job.each(far_ahead), job.seen()
        assert states[0] == states[1]
    with loading(settings, 1, names="b") as job:
        job.ranks[0].loader(batch_size=5).load_state_dict(states[0])
        job.train(batch_size=5)
        assert once_each(seen + job.seen(), range(400))


# --- one way, within bounds, and an end -------------------------------------------------------------------------------------


def test_a_loader_is_taken_in_one_way(settings: Settings, numbers: Path) -> None:
    """Given a loader that is iterated over, when its orders are asked for, then that is refused; and the other way about."""
    with loading(settings, 2) as job:
        loader, other = (rank.loader() for rank in job.ranks)
        next(loader)
        with pytest.raises(DataConflict, match="not by both"):
            loader.orders()
        next(iter(other.orders(workers=2)))
        with pytest.raises(DataConflict, match="not by both"):
            next(other)
        with pytest.raises(DataConflict, match="orders for 2 workers, and 3"):
            other.orders(workers=3)


def test_a_closed_loader_is_no_end_of_the_epoch(settings: Settings, numbers: Path) -> None:
    """Given a loader left half-way and closed, then its thread ends, descriptors are as before, and going on is an error."""
    with loading(settings, 1) as job:
        rank = job.ranks[0]
        rank.session.state.redis.ping()
        with rank.loader() as loader:
            train_on(rank, loader, 2)
            during = len(os.listdir("/proc/self/fd"))
        eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("dtr-load")], what="the thread to end")
        assert len(os.listdir("/proc/self/fd")) <= during
        with pytest.raises(DataConflict, match="was closed"):
            next(loader)


def test_reading_ahead_is_bounded_by_bytes(settings: Settings, tmp_path: Path) -> None:
    """Given batches of 80 KB and a bound of 200 KB, when nobody takes them, then two wait; and a batch above the bound still comes."""
    np.save(tmp_path / "rows.npy", np.arange(200_000, dtype=np.int64).reshape(200, 1000))
    with loading(settings, 1) as job:
        rank = job.ranks[0]
        rank.registry.register("numbers", path=tmp_path / "rows.npy", format="npy", shard_size=20)
        loader = rank.loader(columns=None, prefetch=50, prefetch_bytes=200_000)
        next(loader)
        waiting = eventually(lambda: loader.waiting if loader.waiting[0] >= 2 else None, what="batches that wait")
        assert waiting == (2, 160_000)
        assert sum(1 for _ in loader) == 19
    with loading(settings, 1, names="b") as job:
        job.ranks[0].plane.restored({})
        assert [len(batch) for batch in job.ranks[0].loader(columns=None, prefetch=50, prefetch_bytes=1)] == [10] * 20


def test_a_run_loads_a_data_set_in_one_way(settings: Settings, numbers: Path) -> None:
    """Given a loader, when another is asked for by the same name, then the message says in what it differs."""
    with loading(settings, 1) as job:
        job.ranks[0].loader()
        with pytest.raises(InvalidInput, match="another batch_size, epochs, prefetch; a run loads a data set in one way"):
            job.ranks[0].loader(batch_size=3, epochs=2, prefetch=5)
        with pytest.raises(InvalidInput, match="global_batch_size=8 beside batch_size=10: leave it out: dynamic mode takes batch_size"):
            job.ranks[0].loader(global_batch_size=8)
        with pytest.raises(InvalidInput, match="batch_size must be an integer from 1 to .*, got 0"):
            job.ranks[0].loader(batch_size=0)


@pytest.mark.parametrize("processes", [0, 1])
def test_copies_are_kept_where_the_agent_says(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """Given an agent with a folder and a budget of its own, when packed files are read, and read again, then nothing is elsewhere."""
    monkeypatch.setenv("DTR_DATA_CACHE", str(tmp_path / "other"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"id": %d}\n' % i for i in range(100))))
    where: dict[str, Any] = {"job": settings.job, "staging": settings.staging, "ttl_s": 3.0, "data_cache": str(tmp_path / "own")}
    with Agent("w0", settings.redis_url, 1, **where) as agent:
        agent.datasets.register("packed", path=tmp_path / "packed", format="jsonl", shard_size=25)
        for batch in agent.loader("packed", batch_size=10, processes=processes):
            agent.step(batch)
        (again,) = eventually(lambda: replayed(agent, 3), what="the report of step 3")
        assert len(again) == 10
    with Agent("w0", settings.redis_url, 1, **where, data_cache_bytes=8) as agent:
        (tmp_path / "packed" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n' * 50))
        with pytest.raises(ConfigError, match="8 is what the copies"):
            agent.datasets.register("packed", path=tmp_path / "packed", format="jsonl", shard_size=25)
    assert os.listdir(tmp_path / "own") and not (tmp_path / "other").exists()


def replayed(agent: Agent, step: int) -> list[Batch]:
    """The step's batches; nothing as long as Redis has not heard of it."""
    try:
        return agent.replay(step)
    except StepUnknown:
        return []
