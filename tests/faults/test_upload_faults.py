"""What goes wrong around an upload: Redis, the store, the slot, the trainer, another host. It commits later, or says why it never will."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dtr.checkpoint import parts
from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.slots import scan
from dtr.checkpoint.uploading.upload import Limits
from dtr.state.keys import uploader as presence
from dtr.state.scripts import load
from dtr.store import durable, open_store
from tests.proxy import Proxy
from tests.servers import RedisServer, SeaweedServer, seaweed_server
from tests.uploads import LIMITS, Training, follow, other_uploader, outcome, payload, verified, wait_for_stop
from tests.waiting import eventually


def staged(training: Training) -> list[int]:
    """The steps whose parts still wait in slots."""
    return sorted(found.record.step for found in scan(training.staging) if found.kind == "STAGED" and found.record)


def upload(training: Training, *, step: int = 1, rank: int = 0, **options: object) -> str:
    uploader = training.uploader(**options)  # type: ignore[arg-type]
    try:
        return uploader.upload_part(training.job, training.run.id, step, rank)
    finally:
        uploader.close()


class TestRedis:
    @pytest.mark.parametrize("script", ["part_claim", "part_done", "ckpt_decide"])
    def test_a_lost_reply_costs_nothing(self, training: Training, script: str) -> None:
        """The script took effect and its reply never came: the client sends it again, and the upload goes on under its one claim."""
        training.stage()
        sha = load(script).sha.encode()
        upload(training, step=9)  # the scripts are known to the server, so that the digest alone is sent
        with Proxy(int(training.url.rsplit(":", 1)[1].split("/")[0])) as proxy:
            proxy.drop_replies(1, matching=sha, then="close")
            training.url = f"redis://127.0.0.1:{proxy.port}/0"
            assert upload(training) == "COMMITTED"
            assert proxy.dropped == 1
        assert training.view().parts[0].attempts == 1
        verified(training)

    def test_away_in_mid_upload(self, training: Training) -> None:
        """The pieces go on into the store without Redis; the claim is still ours when it is back, and nothing was sent twice."""
        training.stage(data=payload(1, 0, 48 << 20))
        store = Path(training.store_url.removeprefix("file://"))
        with Proxy(int(training.url.rsplit(":", 1)[1].split("/")[0])) as proxy:
            direct, training.url = training.url, f"redis://127.0.0.1:{proxy.port}/0"
            words: list[str] = []
            limits = Limits(lease_s=60.0, mbps=40.0)
            slow = threading.Thread(target=lambda: words.append(upload(training, limits=limits)))
            slow.start()
            eventually(lambda: any(path.stat().st_size > 8 << 20 for path in store.rglob(".dtr-tmp-*")), what="the first pieces")
            proxy.set_mode("refuse")
            eventually(training.objects, what="all bytes in the store")
            assert training.state_of() == "WRITING"
            proxy.set_mode("pass")
            slow.join(60)
            training.url = direct
        assert words == ["COMMITTED"]
        assert training.view().parts[0].claims == 1
        verified(training)

    def test_away_between_put_and_record(self, training: Training) -> None:
        """The bytes are in the store; the record waits for Redis instead of sending them again."""
        training.stage()
        with Proxy(int(training.url.rsplit(":", 1)[1].split("/")[0])) as proxy:
            training.url = f"redis://127.0.0.1:{proxy.port}/0"
            child = other_uploader(training, fault="upload.after_put=stop")
            wait_for_stop(child, eventually)
            proxy.set_mode("refuse")
            os.kill(child.pid, signal.SIGCONT)
            before = proxy.accepted
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(1.0)
            assert proxy.accepted == before
            proxy.set_mode("pass")
            assert outcome(child) == (0, "COMMITTED")
        assert training.view().parts[0].attempts == 1
        verified(training)


class TestStore:
    def test_a_store_that_refuses_is_visible_and_tried_again(self, training: Training) -> None:
        """The checkpoint stays WRITING with the error on its part, no attempt is used up, and it commits once the store works."""
        training.stage()
        obstacle = Path(training.store_url.removeprefix("file://")) / training.job / "runs"
        obstacle.parent.mkdir(parents=True)
        obstacle.touch()
        for _ in range(LIMITS.max_attempts + 1):
            training.state.redis.hset(training.state.keys.parts(training.run.id, 1), "0/retry_at", 0)
            assert upload(training) == "RELEASED"
        assert upload(training) == "LATER", "the pause is longer after each failure"
        part = training.view().parts[0]
        assert (training.state_of(), part.attempts, part.uploader) == ("WRITING", 0, "")
        assert part.failures == LIMITS.max_attempts + 1
        assert "runs" in part.error
        obstacle.unlink()
        assert training.settled() == "COMMITTED"
        verified(training)

    def test_a_full_store(self, training: Training) -> None:
        """No room in the store is a reason to wait, and leaves nothing half-written behind."""
        folder = Path(training.store_url.removeprefix("file://"))
        folder.mkdir(parents=True)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
        try:
            (folder / "others").write_bytes(b"x" * 900_000)
            training.stage()
            assert upload(training) == "RELEASED"
            assert "space" in training.view().parts[0].error
            (folder / "others").unlink()
            assert training.settled() == "COMMITTED"
            verified(training)
        finally:
            training.store.close()
            subprocess.run(["umount", "-l", str(folder)], check=True)

    @pytest.mark.parametrize("failures", [1, 2, 1000])
    def test_a_manifest_that_may_not_last_is_no_commit(self, training: Training, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
        """The manifest can be read and its folder cannot be synced (EIO): COMMITTED is said after an fsync that succeeded, never before."""
        training.stage()
        synced, real = [], durable.sync_folder

        def sync(folder: str) -> None:
            if Path(folder, "manifest.json").exists():
                synced.append(len(synced) >= failures)
                if not synced[-1]:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(folder)

        monkeypatch.setattr(durable, "sync_folder", sync)
        assert upload(training) == ("COMMITTED" if failures == 1 else "RELEASED")
        assert training.manifest().decision == "commit"
        assert training.state_of() == ("COMMITTED" if True in synced else "SEALED")
        if failures == 2:
            assert training.settled() == "COMMITTED"
            assert synced[-1]
            verified(training)

    def test_s3_killed_in_mid_part(self, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A multipart upload that was begun and died is gone once its checkpoint is decided: no multipart, no second object."""
        for name, value in SeaweedServer(tmp_path / "unused").env.items():
            monkeypatch.setenv(name, value)
        with seaweed_server(tmp_path / "weed") as server:
            training.store_url = server.url("ckpt")
            training.store = open_store(training.store_url).child(training.job)
            training.stage(data=payload(1, 0, 40 << 20))
            status, _ = outcome(other_uploader(training, fault="upload.mid_put=kill"))
            assert status == -signal.SIGKILL
            assert training.settled() == "COMMITTED"
            verified(training)
            with contextlib.closing(server.client()) as client:
                assert not client.list_multipart_uploads(Bucket=server.bucket).get("Uploads")


class TestSlot:
    @pytest.mark.parametrize("when", ["before", "while its trainer makes a slot"])
    def test_bytes_that_are_gone_end_the_checkpoint(self, training: Training, when: str) -> None:
        """Someone emptied the folder: aborted with the reason, rather than waiting for ever, or taking a new slot's bytes for them."""
        record = training.stage()
        (found,) = [slot for slot in scan(training.staging) if slot.kind == "STAGED"]
        if when == "before":
            eventually(lambda: len(list(Path(found.files.folder).glob("slot-*.safetensors"))) > 1, what="the slot made ahead")
        os.unlink(found.files.data)
        if when != "before":
            (arena,) = training.arenas
            eventually(lambda: arena._warming is None or not arena._warming.is_alive(), what="the slot made ahead")
            arena.prepare(record.size_bytes)
            eventually(lambda: arena._warming is None or not arena._warming.is_alive(), what="another slot made ahead")
        assert training.settled() == "ABORTED"
        assert "staged bytes are gone" in training.view().reason

    def test_a_worker_that_stops_gives_its_part_back(self, training: Training) -> None:
        """Shutdown in mid-upload: no object, no attempt used, and the next uploader need not wait for a lease."""
        training.stage()
        assert upload(training, limits=Limits(lease_s=60.0), stopping=lambda: True) == "RELEASED"
        part = training.view().parts[0]
        assert (part.attempts, part.uploader, part.error) == (0, "", "its uploader was shut down")
        assert training.objects() == []
        assert upload(training) == "COMMITTED"
        verified(training)

    def test_a_capped_upload_takes_its_time(self, training: Training) -> None:
        """The bandwidth cap holds from the first byte on."""
        training.stage(data=payload(1, 0, 500_000))
        started = time.monotonic()
        assert upload(training, limits=Limits(mbps=1.0)) == "COMMITTED"
        assert time.monotonic() - started >= 0.4  # half a second's worth; a slow machine only takes longer

    def test_a_long_upload_keeps_its_claim(self, training: Training) -> None:
        """It takes several leases, renewed on the way: nobody else gets the part, and it was one attempt."""
        training.stage(data=payload(1, 0, 40 << 20))
        slow = threading.Thread(target=upload, args=(training,), kwargs={"limits": Limits(lease_s=0.6, mbps=20.0)})
        slow.start()
        eventually(lambda: training.view().parts[0].uploader, what="the claim")
        words = set()
        while slow.is_alive():
            words.add(upload(training))
            slow.join(0.1)
        assert "BUSY" in words
        assert words <= {"BUSY", "COMMITTED"}
        assert training.view().parts[0].attempts == 1
        verified(training)

    def test_the_same_step_twice_uploads_the_first(self, training: Training) -> None:
        """The save that Redis counts is the part; another of the same step is not mixed up with it, and goes when its trainer is gone."""
        training.stage(data=payload(1, 0))
        who = training.members[0]
        second = training.stage(data=b"?" * len(payload(1, 0)), begin=False)
        placed = parts.begin(
            training.state,
            who.state_id,
            training.spec(),
            training.fence(),
            parts.StagedPart(size_bytes=second.size_bytes, save=second.save),
        )
        assert placed.save != second.save
        assert training.settled() == "COMMITTED"
        verified(training)
        assert staged(training) == [1], "its trainer still compares it"
        training.die()
        training.reconciler().look()
        assert staged(training) == []

    def test_a_commit_lets_the_older_ones_go(self, training: Training) -> None:
        """Retention runs after each commit, as the run was started with."""
        training.state.redis.hset(training.state.keys.run(training.run.id), mapping={"keep_last": 1, "grace_ms": 0})
        for step in (1, 2):
            training.stage(step)
            assert training.settled(step) == "COMMITTED"
        assert training.manifest(1).decision == "tombstone"
        verified(training, 2)

    def test_another_hosts_part_is_left_alone(self, training: Training) -> None:
        """A message that strayed changes nothing."""
        training.stage()
        before = training.view().parts
        training.host = "other-host"
        assert upload(training) == "ELSEWHERE"
        assert training.view().parts == before


class TestDeadTrainers:
    def test_a_complete_slot_commits_without_its_trainer(self, training: Training) -> None:
        """Killed before it told anyone: the uploader finds the slot, registers and commits it, and gives all memory back."""
        training.stage(begin=False)
        training.die()
        assert training.settled() == "COMMITTED"
        verified(training)
        training.reconciler().look()
        assert [name for name in os.listdir(training.staging) if not name.startswith(".")] == []

    def test_a_member_that_died_without_its_part_ends_the_checkpoint(self, pair: Training) -> None:
        """At once, with its name and how it died; the other's slot is freed."""
        pair.stage(rank=0)
        pair.die(1)
        assert pair.settled() == "ABORTED"
        assert pair.view().reason == "rank 1: w1 departed (signal 9) before its part was complete"
        assert staged(pair) == []

    def test_a_survivor_that_never_staged_its_part_ends_it_too(self, pair: Training) -> None:
        """The run is over, so nobody will stage anything more under it."""
        pair.stage(rank=0)
        pair.die(0)
        assert pair.settled() == "ABORTED"
        assert pair.view().reason == "rank 1: the run ended before w1 had staged its part"

    def test_both_parts_complete_commit_though_the_run_ended(self, pair: Training) -> None:
        """One part was known to Redis, one was not; both count."""
        pair.stage(rank=0)
        pair.stage(rank=1, begin=False)
        pair.die(0)
        pair.die(1)
        assert pair.settled() == "COMMITTED"
        verified(pair)

    def test_a_member_that_lives_is_waited_for(self, pair: Training) -> None:
        """A slow rank is no dead one."""
        pair.stage(rank=0)
        reconciler, uploader = pair.reconciler(), pair.uploader()
        for _ in range(3):
            for wake in reconciler.look().wakes:
                follow(uploader, wake)
        assert pair.state_of() == "WRITING"
        pair.stage(rank=1)
        assert pair.settled() == "COMMITTED"
        reconciler.close()
        uploader.close()

    def test_what_the_job_left_behind_is_freed(self, training: Training) -> None:
        """A part beyond the step that the next run restored is not uploaded, and its slot is."""
        training.stage(20, begin=False)
        k = training.state.keys
        training.state.redis.hset(k.lineage, mapping={training.run.id: "10", "0002-next": ""})
        training.state.redis.hset(k.meta, "last_run", "0002-next")
        training.reconciler().look()
        assert staged(training) == []
        assert parts.read(training.state, training.run.id, 20) is None

    def test_a_run_that_nobody_knows_keeps_its_bytes(self, training: Training) -> None:
        """Redis forgot the run and its record is not in the store yet: nothing is thrown away."""
        training.stage(begin=False)
        training.state.redis.delete(training.state.keys.run(training.run.id))
        reconciler, uploader = training.reconciler(), training.uploader()
        for wake in reconciler.look().wakes:
            assert follow(uploader, wake) == "UNKNOWN"
        assert staged(training) == [1]
        reconciler.close()
        uploader.close()

    def test_torn_slots_are_reclaimed(self, training: Training) -> None:
        """A look gives back what a kill in mid-copy left, and counts it no part."""
        record = training.stage(begin=False)
        (found,) = [slot for slot in scan(training.staging) if slot.kind == "STAGED"]
        found.files.write(replace(record, state="COPYING"))
        assert training.reconciler().look().staged == 0
        assert scan(training.staging)[0].kind == "FREE"


class Later:
    """A clock that can be moved on."""

    def __init__(self) -> None:
        self.at = 0.0

    def monotonic(self) -> float:
        return self.at

    def wall(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


@pytest.mark.parametrize("uploads_there", [True, False])
def test_a_host_that_died_with_staged_bytes(pair: Training, uploads_there: bool) -> None:
    """Its part will never come: aborted with the reason after 30 s without an uploader there, and only if its member is gone as well."""
    host, pair.host = pair.host, "dead-host"
    pair.stage(rank=1)
    pair.host = host
    pair.state.redis.hset(pair.state.keys.run(pair.run.id), "member:w1", f"1 {pair.members[1].incarnation} dead-host")
    pair.stage(rank=0)
    for found in scan(pair.staging):
        if found.record is not None and found.record.rank == 1:
            found.files.forget()
    if uploads_there:
        pair.state.redis.hset(presence("dead-host"), "host", "dead-host")
    clock = Later()
    reconciler = pair.reconciler()
    reconciler._clock = clock
    reconciler.look()
    clock.at += 40
    reconciler.look()
    assert pair.state_of() == "WRITING", "its member lives"
    pair.die(1)
    reconciler.look()
    assert pair.state_of() == ("WRITING" if uploads_there else "ABORTING")
    if not uploads_there:
        assert "its host dead-host has had no uploader for 30 s" in pair.view().reason
    pair.state.redis.delete(presence("dead-host"))
    reconciler.close()


def test_a_copy_in_progress_is_waited_for(pair: Training) -> None:
    """The run ended while a survivor still copies: the copy may become complete, so it is no lost part yet."""
    pair.stage(rank=0)
    slot = pair.arenas[1].acquire(1000)
    assert slot is not None
    who = pair.members[1]
    record = replace(pair_record(pair), rank=1, worker="w1", incarnation=who.incarnation)
    slot.files.write(record)
    pair.die(0)
    reconciler = pair.reconciler()
    reconciler.look()
    assert pair.state_of() == "WRITING"
    slot.free()
    reconciler.look()
    assert pair.state_of() == "ABORTING"
    reconciler.close()


def pair_record(pair: Training):  # type: ignore[no-untyped-def]
    (found,) = [slot for slot in scan(pair.staging) if slot.kind == "STAGED"]
    assert found.record is not None
    return replace(found.record, state="COPYING")


def test_arenas_of_two_jobs_share_a_host(training: Training, valkey: RedisServer, tmp_path: Path) -> None:
    """One uploader serves every job on its host, and one job's trouble is not another's."""
    other = Training(valkey.url, f"tenant/{training.job}", tmp_path)
    broken = Arena(training.staging, job="unheard-of", worker="w9", policy="fail")
    training.stage()
    other.stage()
    assert training.settled() == "COMMITTED"
    assert other.settled() == "COMMITTED"
    verified(training)
    verified(other)
    broken.close()
    other.close()
