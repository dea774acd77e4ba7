"""The uploader as people run it: Celery's own commands without flags, real saves, kills, garbage in the queue, an orderly end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from dtr import publish
from dtr.checkpoint.staging.slots import scan
from dtr.host import host_id
from dtr.state.keys import upload_queue, uploader
from tests.proxy import Proxy
from tests.servers import RedisServer, free_port
from tests.uploads import Training, is_stopped, payload, verified
from tests.waiting import eventually
from tests.workers import ROOT, celery, end, log_of, pool, wait_for_worker, worker


@pytest.fixture
def training(own_valkey: RedisServer, job: str, tmp_path: Path) -> Iterator[Training]:
    made = Training(own_valkey.url, job, tmp_path)
    yield made
    made.close()


def published(training: Training, step: int = 1, rank: int = 0) -> None:
    """What a trainer's publisher sends after it has begun its part."""
    publish.upload_part(training.url, host=training.host, job=training.job, run=training.run.id, step=step, rank=rank)


def committed(training: Training, *steps: int, timeout_s: float = 60) -> None:
    for step in steps:
        eventually(lambda step=step: training.state_of(step) == "COMMITTED", timeout_s=timeout_s, what=f"the commit of step {step}")  # type: ignore[misc]
        verified(training, step)


def slots_free(training: Training) -> bool:
    return not [found for found in scan(training.staging) if found.kind == "STAGED"]


Stack = tuple[RedisServer, Path, subprocess.Popen[str]]


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server and a worker that several tests share."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "staging").mkdir()
    with RedisServer("valkey", folder / "valkey") as server, worker(url=server.url, staging=folder / "staging") as child:
        yield server, folder, child


class TestOneWorker:
    """What one worker does that nobody disturbs; one start for all."""

    @pytest.fixture
    def training(self, one_worker: Stack, job: str) -> Iterator[Training]:
        made = Training(one_worker[0].url, job, one_worker[1])
        yield made
        made.close()

    def test_a_published_part_commits(self, training: Training) -> None:
        """Woken by the message, committed, and the slot is free again."""
        training.stage()
        published(training)
        committed(training, 1)
        eventually(lambda: slots_free(training), what="a free slot")

    def test_a_published_collection_is_made(self, training: Training) -> None:
        """The message has the job's name alone; the worker notes in Redis that it was this job's turn."""
        publish.collect(training.url, host=training.host, job=training.job)
        key = training.state.keys.retention
        eventually(lambda: training.state.redis.hget(key, "collected_at") is not None, what="a collection")

    def test_a_part_that_nobody_published_commits(self, training: Training) -> None:
        """Its trainer died before it told anyone: the reconciler finds the slot, and the dead trainer's memory goes."""
        training.stage(begin=False)
        training.die()
        committed(training, 1)
        eventually(lambda: not os.path.exists(f"{training.staging}/{training.job}"), what="an empty staging folder")

    def test_the_presence_tells_what_happens(self, one_worker: Stack, training: Training) -> None:
        """dtr:uploader:HOST has who, since when, and how much waits; it ends by itself if its worker does."""
        server, _, child = one_worker
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            found = client.hgetall(uploader(training.host))
            assert (found["host"], found["pid"], found["queue"]) == (training.host, str(child.pid), upload_queue(training.host))
            assert {"started_at", "last_scan_at", "version", "slots", "staged", "staged_bytes", "open_checkpoints", "uploads"} <= set(found)
            assert 0 < client.pttl(uploader(training.host)) <= 15_000
            eventually(lambda: client.hget(uploader(training.host), "last_scan_at") != found["last_scan_at"], what="another look")

    def test_inspect_answers(self, training: Training) -> None:
        """celery -A tasks inspect works without flags, and shows this host's queue and both tasks."""
        kinds = ("ping", "active", "active_queues", "registered")
        children = {what: celery("inspect", what, "--json", url=training.url, staging=training.staging) for what in kinds}
        answers = {}
        for what, child in children.items():
            try:
                assert child.wait(60) == 0, log_of(child)
                (answers[what],) = json.loads(log_of(child)[log_of(child).index("{") :]).values()
            finally:
                end(child)
        assert answers["ping"] == {"ok": "pong"}
        assert [queue["name"] for queue in answers["active_queues"]] == [upload_queue(training.host)]
        assert sorted(answers["registered"]) == ["dtr.collect", "dtr.settle", "dtr.upload_part"]

    def test_what_is_no_message_does_no_harm(self, one_worker: Stack, training: Training) -> None:
        """Not JSON, too deep, too large, wrong fields, an unknown job's: dropped with a line, and work goes on."""
        server, _, child = one_worker
        queue = upload_queue(training.host)
        good = {"job": training.job, "run": training.run.id, "step": 1, "rank": 0}
        with redis.Redis.from_url(server.url) as client:
            for raw in (b"not json", b"{}", b"[]", b'{"body": "x"}', b"\xff\xfe", b"[" * 10_000, b'{"headers": {}, "properties": {}}'):
                client.lpush(queue, raw)
            app = publish._app(server.url, os.getpid())
            for given in (
                {}, good | {"job": "../x"}, good | {"step": -1}, good | {"step": "1"}, good | {"rank": True}, good | {"extra": 1},
                good | {"run": "x" * 10_000_000}, good | {"job": "nobody-knows"}, good | {"run": ["a"]},
            ):  # fmt: skip
                app.send_task(publish.UPLOAD_PART, kwargs=given, queue=queue)
            app.send_task(publish.UPLOAD_PART, args=[training.job, training.run.id, 1, 0], queue=queue)
            app.send_task("dtr.no_such_task", queue=queue)
            eventually(lambda: client.llen(queue) == 0, what="an empty queue")
            assert client.hlen("unacked") == 0 or eventually(lambda: client.hlen("unacked") == 0, what="no unanswered message")
            assert not client.exists("dtr:{nobody-knows}:meta"), "a stray message makes no job"
        training.stage()
        published(training)
        committed(training, 1)
        assert child.poll() is None
        log = log_of(child)
        assert "was no message, and is dropped" in log
        assert "a message was rejected: step must be an integer" in log
        assert max(map(len, log.splitlines())) < 2_000

    def test_a_deleted_queue_delays_nothing_for_long(self, one_worker: Stack, training: Training) -> None:
        """The queue key goes right after the enqueue, while both pool processes are stopped: the reconciler wakes them again."""
        children = pool(one_worker[2])
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
        training.stage(1)
        training.stage(2)
        for step in (1, 2):
            published(training, step)
        with redis.Redis.from_url(training.url) as client:
            client.delete(upload_queue(training.host))
        for pid in children:
            os.kill(pid, signal.SIGCONT)
        committed(training, 1, 2)

    def test_an_emptied_staging_folder_stays_the_same_host(self, training: Training) -> None:
        """Somebody cleans /dev/shm: the uploader puts its id back, so that later trainers still have its queue, and living ones go on."""
        shutil.rmtree(training.staging)
        eventually(lambda: os.path.exists(f"{training.staging}/.host-id"), what="the id")
        assert host_id(training.staging) == training.host
        training.stage()
        published(training)
        committed(training, 1)

    def test_an_emptied_redis_is_filled_again(self, training: Training) -> None:
        """FLUSHALL of everything, queue and bindings included: the worker comes back by itself and takes messages."""
        with redis.Redis.from_url(training.url) as client:
            client.flushall()
            eventually(lambda: client.exists(uploader(training.host)), what="the uploader's presence")
        again = Training(training.url, training.job, Path(training.staging).parent)
        try:
            again.stage()
            published(again)
            committed(again, 1)
        finally:
            again.close()


class TestKills:
    def test_sigkill_of_a_pool_process(self, training: Training, tmp_path: Path) -> None:
        """The process dies in mid-upload: its part is claimed anew after the lease and commits; the worker lives on."""
        once = tmp_path / "once"
        with worker(url=training.url, staging=training.staging, DTR_TESTING="1", DTR_FAILPOINT=f"upload.mid_put=kill@{once}") as child:
            training.stage()
            published(training)
            committed(training, 1)
            assert once.exists()
            assert training.view().parts[0].attempts == 2
            assert child.poll() is None

    def test_sigkill_of_the_whole_worker(self, training: Training, tmp_path: Path) -> None:
        """Main process killed while a child is in mid-upload: no orphan stays, and the next worker resumes within 15 s."""
        once = tmp_path / "once"
        with worker(url=training.url, staging=training.staging, DTR_TESTING="1", DTR_FAILPOINT=f"upload.mid_put=stop@{once}") as child:
            training.stage()
            published(training)
            eventually(lambda: any(is_stopped(pid) for pid in pool(child)), what="an upload that is under way")
            children = pool(child)
            os.kill(child.pid, signal.SIGKILL)
            child.wait(10)
            eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), what="the end of the orphans")
        began = time.monotonic()
        with worker(url=training.url, staging=training.staging):
            committed(training, 1)
            assert time.monotonic() - began < 15 + 15, "with the start of a worker"

    def test_a_part_that_kills_its_process_each_time(self, training: Training) -> None:
        """max_attempts, then the checkpoint is aborted with the reason; the worker goes on, and so do other parts."""
        with worker(url=training.url, staging=training.staging, DTR_TESTING="1", DTR_FAILPOINT="upload.after_claim=kill") as child:
            training.stage()
            published(training)
            eventually(lambda: training.state_of() == "ABORTED", timeout_s=60, what="the abort")
            assert "3 attempts to upload its part ended without progress" in training.view().reason
            assert child.poll() is None
            eventually(lambda: slots_free(training), what="a free slot")

    def test_redis_away_and_back(self, training: Training, own_valkey: RedisServer) -> None:
        """The server is killed and comes back empty: the worker waits, logs it once, and works on."""
        with worker(url=training.url, staging=training.staging) as child:
            own_valkey.kill()
            eventually(lambda: "the reconciler waits" in log_of(child), what="a line about the outage")
            time.sleep(1.5)
            own_valkey.start()
            wait_for_worker(child, training.url, training.staging)
            assert log_of(child).count("the reconciler waits") <= 2
            again = Training(training.url, training.job, Path(training.staging).parent)
            again.stage()
            eventually(lambda: again.state_of() == "COMMITTED", timeout_s=60, what="a commit after the outage")
            again.close()

    @pytest.mark.soak
    @pytest.mark.parametrize("fault", ["half_open", "blackhole", "drop_replies", "flapping"])
    def test_a_broken_path_to_the_broker(self, training: Training, own_valkey: RedisServer, fault: str) -> None:
        """Whatever the path does, and whatever messages it swallows, the worker comes back by itself and everything commits."""
        with Proxy(own_valkey.port) as proxy:
            broker = f"redis://127.0.0.1:{proxy.port}/0"
            with worker(url=training.url, staging=training.staging, DTR_BROKER_URL=broker):
                training.stage(1)
                committed(training, 1)
                if fault == "half_open":
                    proxy.half_open()
                for mode in ("reset", "pass") * 5 if fault == "flapping" else (fault, "pass") if fault != "half_open" else ():
                    proxy.set_mode(mode)
                    time.sleep(0.3)
                training.stage(2)
                committed(training, 2)

    @pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGQUIT])
    @pytest.mark.parametrize("hangs", [False, True])
    def test_an_orderly_end(self, training: Training, how: signal.Signals, hangs: bool, tmp_path: Path) -> None:
        """In mid-upload: ends by itself even if the upload hangs for ever; presence gone, no process left, resumable at once."""
        cap = {} if hangs else {"DTR_UPLOAD_MBPS": "0.2"}
        fault = f"upload.mid_put=stop@{tmp_path / 'once'}" if hangs else ""
        env = {"DTR_TESTING": "1", "DTR_FAILPOINT": fault} if fault else {}
        with worker(url=training.url, staging=training.staging, **cap, **env) as child:
            training.stage(data=payload(1, 0, 40 << 20))
            published(training)
            eventually(lambda: training.view().parts[0].uploader, what="a claim")
            if hangs:
                eventually(lambda: any(is_stopped(pid) for pid in pool(child)), what="a hanging upload")
            children = pool(child)
            os.kill(child.pid, how)
            child.wait(60)
            eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), what="the end of the pool")
        with redis.Redis.from_url(training.url) as client:
            assert not client.exists(uploader(training.host)) or hangs
        assert training.state_of() == "WRITING"
        assert training.settled() == "COMMITTED"
        verified(training)


def test_a_folder_that_became_another_host_ends_the_worker(own_valkey: RedisServer, tmp_path: Path) -> None:
    """A trainer was quicker to give the emptied folder an id: a worker that consumed the old queue for ever would look healthy."""
    staging = tmp_path / "staging"
    with worker(url=own_valkey.url, staging=staging) as child:
        fresh = staging / ".new"
        fresh.write_text("another-host\n")
        fresh.rename(staging / ".host-id")
        assert child.wait(20) == 0
        assert "belongs to host another-host by now" in log_of(child)


def test_flower_binds_this_machine_alone(own_valkey: RedisServer, tmp_path: Path) -> None:
    """celery -A tasks flower, without flags: 127.0.0.1 and nothing else."""
    port = free_port()
    child = celery("flower", f"--port={port}", url=own_valkey.url, staging=tmp_path)
    try:

        def listens() -> bool:
            assert child.poll() is None, log_of(child)
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        eventually(listens, timeout_s=60, what="Flower's port")
        table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        bound = {line.split()[1].rsplit(":", 1)[0] for line in table.splitlines() if f":{port:04X} " in line and " 0A " in line}
        assert bound == {"0100007F"}
    finally:
        end(child)


def test_importing_the_tasks_is_cheap(tmp_path: Path) -> None:
    """No connection, no folder, no setting read, no boto3, no numpy: the import alone."""
    script = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise AssertionError('a connection at import')\n"
        "socket.socket.connect = refuse\n"
        "import tasks\n"
        "print(type(tasks.app).__name__, [m for m in ('boto3', 'numpy', 'awscrt', 'dtr.checkpoint') if m in sys.modules])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DTR_REDIS_URL": "nonsense", "DTR_STAGING": str(tmp_path / "none")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout == "Application []\n", done.stderr
    assert os.listdir(tmp_path) == []


def test_a_server_that_refuses_ends_the_worker(tmp_path: Path) -> None:
    """A wrong password does not become right by waiting: one line, masked, status 4."""
    with RedisServer("valkey", tmp_path / "valkey", args=("--requirepass", "right")) as server:
        child = celery("worker", url=f"redis://:wrong-secret@127.0.0.1:{server.port}/0", staging=tmp_path)
        try:
            assert child.wait(60) == 4, log_of(child)
            assert "refuses" in log_of(child)
            assert "wrong-secret" not in log_of(child)
            assert "Traceback" not in log_of(child)
        finally:
            end(child)


def test_a_wrong_setting_is_one_line(tmp_path: Path) -> None:
    """A worker that cannot start says why, without a stack, and ends with status 3."""
    child = celery("worker", url="http://127.0.0.1", staging=tmp_path)
    try:
        assert child.wait(60) == 3
        assert "broker_url: unknown scheme 'http'" in log_of(child)
        assert "Traceback" not in log_of(child)
    finally:
        end(child)
