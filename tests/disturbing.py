"""A job of real trainers, an uploader and a Redis with an append-only file, and whoever kills, stops, adds, removes and empties them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import redis

from tests.oracle_trainer import STALE, Task, write_data
from tests.servers import RedisServer
from tests.waiting import eventually
from tests.workers import QUICK, celery, end, log_of

ROOT = Path(__file__).resolve().parent.parent
TTL_S: Final = 1.0
KINDS: Final = ("kill", "stop", "add", "remove", "uploader", "redis", "emptied", "restart")
OFTEN: Final = (3, 1, 1, 1, 1, 1, 1, 1)
AS_EXPECTED: Final = (0, STALE, -signal.SIGKILL)


@dataclass
class Job:
    """The processes of one job, without a launcher: each trainer beats for itself, and is started again when it was taken for dead.

    Args:
        server: the coordinator; restarting it must keep what it knew.
        name: of the job.
        folder: for data, logs, staging and store.
        task: of every trainer.
        high, low: the most and the least trainers.
        ttl_s: after which a silent trainer is dead.
    """

    server: RedisServer
    name: str
    folder: Path
    task: Task
    high: int
    low: int = 1
    ttl_s: float = TTL_S
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    surprises: list[str] = field(default_factory=list)
    uploader: subprocess.Popen[str] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "task.json").write_text(json.dumps(asdict(self.task)))
        write_data(self.folder / "data", self.task)
        self.staging = self.folder / "staging"
        self._out = (self.folder / "out").open("ab")
        self._read: dict[Path, tuple[int, int]] = {}  # log -> bytes read, samples in them

    # --- its processes ----------------------------------------------------------------------------------------------

    def start(self, worker: str, **more: str) -> None:
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "DTR_REDIS_URL": self.server.url, "DTR_JOB": self.name, "DTR_STAGING": str(self.staging),
            "DTR_WORKER_ID": worker, "DTR_STORE": str(self.folder / "store"), "WORLD_SIZE": str(self.high), "DTR_WORLD_MIN": str(self.low),
            "DTR_TTL_S": str(self.ttl_s), "DTR_BEAT_INTERVAL_S": "0.25", "DTR_SETTLE_S": "0.4", "DTR_BARRIER_TIMEOUT_S": "60", **more,
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.oracle_trainer", str(self.folder)]
        self.children[worker] = subprocess.Popen(command, cwd=ROOT, env=env, stdout=self._out, stderr=self._out)

    def start_uploader(self) -> None:
        self.uploader = celery("worker", url=self.server.url, staging=self.staging, env=QUICK)

    def end_uploader(self) -> None:
        if self.uploader is not None:
            with (self.folder / "uploader").open("a") as log:
                log.write(log_of(self.uploader))
            end(self.uploader)
            self.uploader = None

    def begin_again(self, size: int, how: signal.Signals = signal.SIGKILL) -> None:
        """End every trainer, and begin with this many."""
        for worker in self.children:
            self.send(worker, how)
        for worker in list(self.children):
            self.end(worker, how)
        for n in range(size):
            self.start(f"w{n}")

    def alive(self) -> list[str]:
        return sorted(worker for worker, child in self.children.items() if child.poll() is None)

    def send(self, worker: str, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.children[worker].send_signal(number)

    def end(self, worker: str, how: signal.Signals) -> None:
        """Send this until the trainer has ended: a SystemExit that a handler raises is lost where Python ignores exceptions."""
        child = self.children.pop(worker)

        def ended() -> bool:
            child.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(2)
            return child.returncode is not None

        eventually(ended, timeout_s=60, what=f"the end of {worker}")

    def tend(self) -> None:
        """Start again who was killed or taken for dead, as a launcher would; any other end of a trainer is on record."""
        for worker, child in list(self.children.items()):
            code = child.poll()
            if code in (None, 0) or self.over():
                continue
            if code not in AS_EXPECTED:
                last_words = (self.folder / "out").read_text()[-4000:]
                self.surprises.append(f"{worker} ended with {code}, after {last_words}")
            self.start(worker)

    def over(self) -> bool:
        return (self.folder / "lineage.json").exists()

    # --- how far it is ----------------------------------------------------------------------------------------------

    def samples(self) -> int:
        """How many samples were logged so far, by all, those of steps that came to nothing included."""
        for path in self.folder.glob("log-*.jsonl"):
            done, samples = self._read.get(path, (0, 0))
            with path.open("rb") as log:
                log.seek(done)
                more = log.read()
            whole = more[: more.rfind(b"\n") + 1]
            self._read[path] = done + len(whole), samples + sum(len(json.loads(line).get("ids", ())) for line in whole.splitlines())
        return sum(samples for _, samples in self._read.values())

    def wait_for_samples(self, goal: int, timeout_s: float = 180) -> None:
        """Wait until so many samples were logged in all."""

        def reached() -> bool:
            self.tend()
            time.sleep(0.03)  # the cores are the trainers'
            return self.samples() >= goal

        eventually(reached, timeout_s=timeout_s, what=f"{goal} samples")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Trainers that have consumed everything wait for the end of the block, so that whatever happens in it falls into the job."""
        hold = self.folder / "hold"
        hold.touch()
        try:
            yield
        finally:
            hold.unlink()

    def wait(self, timeout_s: float = 300) -> None:
        """Until all have ended."""

        def ended() -> bool:
            self.tend()
            time.sleep(0.03)
            return self.over() and not self.alive()

        eventually(ended, timeout_s=timeout_s, what="the end of the job")

    def close(self) -> None:
        for worker, child in self.children.items():
            self.send(worker, signal.SIGKILL)
            child.wait(30)
        self.end_uploader()
        self._out.close()


@contextmanager
def training(
    server: RedisServer, name: str, folder: Path, task: Task, *, size: int, high: int, low: int = 1, ttl_s: float = TTL_S
) -> Iterator[Job]:
    """A job of ``size`` trainers and an uploader; all are ended with the block."""
    job = Job(server, name, folder, task, high=high, low=low, ttl_s=ttl_s)
    try:
        job.start_uploader()
        for n in range(size):
            job.start(f"w{n}")
        yield job
    finally:
        job.close()


# --- the events ---------------------------------------------------------------------------------------------------------


def drawn(dice: random.Random, count: int) -> list[str]:
    """So many events: every kind, and the rest as often as they should be."""
    events = [*KINDS, *dice.choices(KINDS, OFTEN, k=max(0, count - len(KINDS)))][:count]
    dice.shuffle(events)
    return events


def disturb(job: Job, dice: random.Random, event: str) -> str:
    """Do an event, and what is needed for the job to go on; returns what it was."""
    alive = job.alive()
    if event == "add" and len(alive) >= job.high:
        event = "remove"
    elif event == "remove" and len(alive) <= 2:
        event = "add"
    worker = dice.choice(alive) if alive else ""
    if event == "restart":
        return _restart(job, dice, len(alive))
    if event == "add":
        worker = f"w-{dice.randrange(1 << 16):04x}"
        job.start(worker)
    elif event == "uploader":
        job.end_uploader()
        job.start_uploader()
    elif event == "redis":
        how = dice.choice([job.server.kill, job.server.stop])
        how()
        job.server.start()
        return f"redis {how.__name__}"
    elif event == "emptied":
        return _empty(job, dice.choice(["alive", "dead"]))
    elif worker:
        _trouble(job, worker, event)
    return f"{event} {worker}" if event in {"kill", "stop", "add", "remove"} else event


def _trouble(job: Job, worker: str, event: str) -> None:
    if event == "kill":
        job.send(worker, signal.SIGKILL)
        job.children[worker].wait(30)
    elif event == "stop":
        job.send(worker, signal.SIGSTOP)
        time.sleep(3 * TTL_S)
        job.send(worker, signal.SIGCONT)
    else:
        job.end(worker, signal.SIGTERM)


def _empty(job: Job, uploader: str) -> str:
    """FLUSHALL: the trainers form anew and go on from what the store has; so does an uploader, also one that died before."""
    if uploader == "dead":
        job.end_uploader()
    with redis.Redis.from_url(job.server.url) as client:
        client.flushall()
    if uploader == "dead":
        job.start_uploader()
    return f"emptied (uploader {uploader})"


def _restart(job: Job, dice: random.Random, before: int) -> str:
    """End every trainer, and begin with another number of them."""
    how = dice.choice([signal.SIGKILL, signal.SIGTERM])
    after = dice.choice([n for n in range(max(job.low, job.high // 2), job.high + 1) if n != before])
    job.begin_again(after, how)
    return f"restart {before} -> {after} ({how.name})"
