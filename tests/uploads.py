"""A job whose run may save, its slots, and uploaders for it: in this process, or in others that are killed and stopped on demand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtr.checkpoint import checksum, parts
from dtr.checkpoint.manifest import Manifest
from dtr.checkpoint.parts import CheckpointView
from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.slots import Found, SlotRecord, scan
from dtr.checkpoint.survey import manifest_key, read_manifest
from dtr.checkpoint.uploading.reconcile import Reconciler, Wake
from dtr.checkpoint.uploading.upload import Limits, Uploader
from dtr.host import host_id
from dtr.membership import Identity, depart, join, new_incarnation, open_state
from dtr.runs import Run, new_run_name, read_run
from dtr.state.job import JobState
from dtr.store import open_store
from tests.staged import PlainLayout

ROOT = Path(__file__).parent.parent
LIMITS = Limits(lease_s=0.6, max_attempts=3)


class Training:
    """Trainers of one run on this host, without their processes; each has an arena."""

    def __init__(self, url: str, job: str, folder: Path, *, world_size: int = 1) -> None:
        self.url, self.job = url, job
        self.staging, self.store_url = str(folder / "staging"), f"file://{folder / 'store'}"
        self.state = JobState(url, job, name="test")
        self.host = host_id(self.staging)
        self.store = open_store(self.store_url).child(job)
        self.members = [self._join(f"w{n}") for n in range(world_size)]
        self.run = self._form(1)
        self.arenas = [Arena(self.staging, job=job, worker=who.worker_id, policy="fail") for who in self.members]

    def _join(self, worker: str) -> Identity:
        who = Identity(state_id=open_state(self.state), worker_id=worker, incarnation=new_incarnation(), host=self.host, pid=os.getpid())
        join(self.state, who, ttl_ms=600_000)
        return who

    def _form(self, number: int) -> Run:
        k, size, answer = self.state.keys, len(self.members), [""]
        name = new_run_name(number)
        for rank, who in enumerate(self.members):
            answer = self.state.call(
                "form_arrive",
                [k.meta, k.members, k.fences, k.roster, k.forming, k.wake, k.events, k.run(name)],
                [who.state_id, who.worker_id, who.incarnation, rank, who.host, size, size, 0, name, ""],
            )
        assert answer[0] == "formed", answer
        # What the run continues (nothing) is on record, as a manager's first save leaves it.
        self.state.redis.hset(
            k.run(answer[1]), mapping={"base_state": "SET", "base_run": "", "base_step": "", "store": self.store_url, "keep_last": 0}
        )
        self.state.redis.hset(k.lineage, answer[1], "")
        return read_run(self.state, answer[1])

    def stage(self, step: int = 1, rank: int = 0, data: bytes | None = None, *, begin: bool = True) -> SlotRecord:
        """One rank's part, complete in a slot; with ``begin``, Redis knows it."""
        data = payload(step, rank) if data is None else data
        slot = self.arenas[rank].acquire(len(data))
        assert slot is not None
        who = self.members[rank]
        record = slot.write(
            PlainLayout(len(data)),
            {"x": data},
            SlotRecord(
                job=self.job, run=self.run.id, step=step, rank=rank, world_size=len(self.members), worker=who.worker_id,
                incarnation=who.incarnation, host=self.host, store=self.store_url,
            ),
        )  # fmt: skip
        if begin:
            part = parts.StagedPart(size_bytes=record.size_bytes, save=record.save)
            parts.begin(self.state, who.state_id, self.spec(step), self.fence(rank), part)
        return record

    def spec(self, step: int = 1) -> parts.Spec:
        return parts.Spec(run=self.run.id, step=step, world_size=len(self.members), store=self.store_url)

    def fence(self, rank: int = 0) -> parts.Fence:
        who = self.members[rank]
        return parts.Fence(rank=rank, worker=who.worker_id, incarnation=who.incarnation, host=self.host)

    def die(self, rank: int = 0) -> None:
        """The launcher reports the trainer's death; its arena is left as a killed process leaves it."""
        who = self.members[rank]
        depart(self.state, state_id=who.state_id, worker_id=who.worker_id, incarnation=who.incarnation, reason="signal 9")
        for hold in self.arenas[rank]._owners.values():
            hold.release()

    def uploader(self, limits: Limits = LIMITS, **options: Any) -> Uploader:
        return Uploader(redis_url=self.url, staging=self.staging, host=self.host, limits=limits, **options)

    def reconciler(self) -> Reconciler:
        return Reconciler(redis_url=self.url, staging=self.staging, host=self.host)

    def view(self, step: int = 1) -> CheckpointView:
        found = parts.read(self.state, self.run.id, step)
        assert found is not None
        return found

    def state_of(self, step: int = 1) -> str:
        found = parts.read(self.state, self.run.id, step)
        return found.state if found is not None else ""

    def manifest(self, step: int = 1) -> Manifest:
        return read_manifest(self.store, self.run.id, step)

    def manifest_bytes(self, step: int = 1) -> bytes:
        return self.store.get(manifest_key(self.run.id, step))

    def objects(self, step: int = 1) -> list[str]:
        """The keys of one checkpoint's parts in the store, of whatever upload."""
        folder = manifest_key(self.run.id, step).rpartition("/")[0]
        return [key for key in self.store.list(folder) if not key.endswith("manifest.json")]

    def slots(self) -> list[Found]:
        return scan(self.staging)

    def settled(self, step: int = 1, *, timeout_s: float = 30.0) -> str:
        """What a worker would do until the checkpoint is decided: look, and do what that wakes."""
        reconciler, uploader = self.reconciler(), self.uploader()
        deadline = time.monotonic() + timeout_s
        try:
            while time.monotonic() < deadline:
                for wake in reconciler.look().wakes:
                    follow(uploader, wake)
                if self.state_of(step) in parts.FINAL_STATES:
                    reconciler.look()
                    return self.state_of(step)
                time.sleep(0.05)
            raise AssertionError(f"step {step} is still {self.state_of(step)!r}")
        finally:
            reconciler.close()
            uploader.close()

    def close(self) -> None:
        for arena in self.arenas:
            arena.close()
        self.store.close()
        self.state.close()


def follow(uploader: Uploader, wake: Wake) -> str:
    """Do what a message would have a pool process do."""
    if wake.rank is None:
        return uploader.settle(wake.job, wake.run, wake.step)
    return uploader.upload_part(wake.job, wake.run, wake.step, wake.rank)


def payload(step: int, rank: int, size_bytes: int = 200_000) -> bytes:
    """The bytes of one part; each part's own."""
    return bytes([65 + (step * 7 + rank) % 26]) * size_bytes


def verified(training: Training, step: int = 1) -> None:
    """The manifest is valid, every object has its recorded bytes (I1), and there is no other object (I9)."""
    manifest = training.manifest(step)
    assert manifest.decision == "commit"
    assert sorted(training.objects(step)) == sorted(part.object for part in manifest.parts)
    for part in manifest.parts:
        data = training.store.get(part.object)
        assert data == payload(step, part.rank, len(data))
        assert checksum.of(data) == part.checksum


UPLOAD = """
import sys
from dtr.checkpoint.uploading.upload import Limits, Uploader
url, staging, host, job, run, step, rank = sys.argv[1:]
uploader = Uploader(redis_url=url, staging=staging, host=host, limits=Limits(lease_s=0.6, max_attempts=3))
print(uploader.settle(job, run, int(step)) if rank == "settle" else uploader.upload_part(job, run, int(step), int(rank)), flush=True)
"""


def other_uploader(training: Training, *, step: int = 1, rank: int | str = 0, fault: str = "") -> subprocess.Popen[str]:
    """A process that uploads one part (or settles the checkpoint), with a fault on its way."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if fault:
        env |= {"DTR_FAILPOINT": fault, "DTR_TESTING": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", UPLOAD, training.url, training.staging, training.host, training.job, training.run.id, f"{step}", f"{rank}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


def outcome(child: subprocess.Popen[str], *, timeout_s: float = 60) -> tuple[int, str]:
    """Exit status and answer of a process that ends by itself."""
    out, err = child.communicate(timeout=timeout_s)
    assert child.returncode in {0, -signal.SIGKILL}, err
    return child.returncode, out.strip()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_for_stop(child: subprocess.Popen[str], waits: Callable[..., Any]) -> None:
    """Return once a child has stopped itself."""
    waits(lambda: is_stopped(child.pid), what="a stopped uploader")
