"""Uploads that die in the middle are gone on with: the pieces in flight are sent again, no others, and nothing is left over."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtr.checkpoint import checksum
from dtr.checkpoint.keeping import orphans
from dtr.checkpoint.keeping.collect import Scene, look
from dtr.checkpoint.keeping.orphans import sweep
from dtr.checkpoint.survey import record_key
from dtr.checkpoint.uploading.upload import Limits
from dtr.store import open_store, pieces
from dtr.store.durable import TEMPORARY
from tests.resuming import Uploaders, killed_again_and_again, noted, uploaders
from tests.s3_faults import FaultyS3
from tests.servers import SeaweedServer, seaweed_server
from tests.uploads import LIMITS, Training, other_uploader, outcome, wait_for_stop
from tests.waiting import eventually

MIB = 1 << 20
AT_ONCE = 4  # parts that an upload to S3 has in flight at most


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with seaweed_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def faulty(weed: SeaweedServer) -> Iterator[FaultyS3]:
    with FaultyS3(weed) as proxy:
        yield proxy


@pytest.fixture
def s3(training: Training, weed: SeaweedServer, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Training:
    """The same job with its store on a real S3 server, behind a proxy that counts, and may be told to fail."""
    for name, value in weed.env.items():
        monkeypatch.setenv(name, value)
    training.store_url = weed.url("ckpt", endpoint=faulty.endpoint)
    training.store = open_store(weed.url("ckpt")).child(training.job)
    return training


def small_pieces(monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(pieces, "_SMALLEST_BYTES", piece_bytes)


def noise(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes of which no two pieces are alike."""
    return np.random.default_rng(seed).bytes(size_bytes)


def whole(training: Training, data: bytes) -> None:
    """One commit with one object, which is these bytes, whole and by pieces."""
    manifest = training.manifest()
    (part,) = manifest.parts
    stored = training.store.get(part.object)
    assert stored == data
    assert part.checksum == checksum.of(data)
    assert part.pieces == checksum.hex_of(checksum.pieces_of(data, part.piece_bytes))
    assert training.objects() == [part.object]
    assert training.store.abort_uploads() == 0
    assert not training.state.redis.exists(training.state.keys.transfer(training.run.id, 1, 0))


def sent_again(running: Uploaders, count: int) -> int:
    """How many pieces were begun more than once, every further time counted; all were begun."""
    found = running.sent()
    assert set(found) == set(range(1, count + 1))
    return sum(found.values()) - count


@pytest.mark.parametrize("store", ["local", "s3"])
def test_killed_again_and_again(training: Training, store: str, request: pytest.FixtureRequest) -> None:
    """Eight kills in one upload: it commits, a kill costs the pieces in flight, and no attempt counts since each got further."""
    size, each, in_flight = (64 * MIB, MIB, 1) if store == "local" else (200 * MIB, 5 * MIB, AT_ONCE)
    if store == "s3":
        request.getfixturevalue("s3")
    data = noise(size)
    training.stage(data=data)
    with uploaders(training, piece_bytes=each, mbps=80.0) as running:
        assert killed_again_and_again(training, running, 8, longest_s=0.05) == 8
        running.start()
        running.wait()
        assert sent_again(running, size // each) <= 8 * in_flight
    assert training.state_of() == "COMMITTED"
    whole(training, data)


@pytest.mark.soak
@pytest.mark.parametrize("store", ["local", "s3"])
def test_fifty_kills_in_two_gibibytes(training: Training, store: str, request: pytest.FixtureRequest) -> None:
    """The same with fifty kills, pieces as they are, and 2 GiB."""
    if store == "s3":
        request.getfixturevalue("s3")
    data = noise(2048 * MIB)
    training.stage(data=data)
    with uploaders(training, piece_bytes=16 * MIB, mbps=100.0) as running:
        kills = killed_again_and_again(training, running, 50, longest_s=0.05)
        assert kills == 50
        running.start()
        running.wait()
        assert sent_again(running, 128) <= kills * (1 if store == "local" else AT_ONCE)
    assert training.state_of() == "COMMITTED"
    whole(training, data)


class TestOneKill:
    """Each point at which an upload may end between two requests."""

    @pytest.mark.parametrize("newest", [False, True])
    def test_an_upload_that_is_on_no_record_is_an_orphan(self, s3: Training, monkeypatch: pytest.MonkeyPatch, newest: bool) -> None:
        """Killed between the service's answer and the record, and then all is lost, slot and Redis: `gc --orphans` aborts the upload.

        In the newest run, which may be about to begin one, only when it is old enough.
        """
        s3.stage(data=noise(40 * MIB))
        assert outcome(other_uploader(s3, fault="store.s3.before_record=kill"))[0] == -signal.SIGKILL
        redis, k, run = s3.state.redis, s3.state.keys, s3.run.id
        redis.delete(k.ckpt(run, 1), k.parts(run, 1), k.ckpts, k.open_ckpts)
        redis.hset(k.run(run), "store", s3.store_url)
        if not newest:
            redis.hset(k.run("0002-next"), mapping={"base_state": "SET", "base_run": "", "store": s3.store_url, "keep_last": 0})
            redis.hset(k.lineage, "0002-next", "")
            redis.hset(k.meta, "last_run", "0002-next")
            s3.store.put(record_key(run), b"a run that left nothing else")
        store = open_store(s3.store_url).child(s3.job)
        scene = look(s3.state, store)
        assert isinstance(scene, Scene)
        assert sweep(store, s3.state, scene, dry_run=True).uploads == 0
        assert sweep(store, s3.state, scene).uploads == (0 if newest else 1)
        monkeypatch.setattr(orphans, "_YOUNG_S", 0.0)
        assert sweep(store, s3.state, scene).uploads == (1 if newest else 0)
        assert s3.store.abort_uploads() == 0

    @pytest.mark.parametrize(
        "point",
        ["store.s3.before_record", "store.s3.after_create", "store.s3.before_complete", "store.s3.after_complete", "upload.after_put"],
    )
    def test_s3(self, s3: Training, faulty: FaultyS3, point: str) -> None:
        """Killed there: the next one commits, every piece was sent once, no upload stays open, no second object."""
        data = noise(40 * MIB)
        s3.stage(data=data)
        status, _ = outcome(other_uploader(s3, fault=f"{point}=kill"))
        assert status == -signal.SIGKILL
        assert s3.settled() == "COMMITTED"
        whole(s3, data)
        assert faulty.count("partNumber=") == 3

    @pytest.mark.parametrize("point", ["store.local.before_write", "upload.mid_put", "store.local.before_link", "store.local.after_link"])
    def test_local(self, training: Training, point: str) -> None:
        """The same in a folder: no temporary file stays."""
        data = noise(40 * MIB)
        training.stage(data=data)
        status, _ = outcome(other_uploader(training, fault=f"{point}=kill"))
        assert status == -signal.SIGKILL
        assert training.settled() == "COMMITTED"
        whole(training, data)
        assert temporaries(training) == []


def temporaries(training: Training) -> list[str]:
    root = training.store_url.removeprefix("file://")
    return [name for _, _, names in os.walk(root) for name in names if name.startswith(TEMPORARY)]


def stopped_after_first_piece(training: Training, **limits: Any) -> str:
    """An uploader that is shut down once a piece is in the store; its part goes back with the upload on record."""
    over = threading.Event()
    uploader = training.uploader(Limits(lease_s=60.0, mbps=40.0, **limits), stopping=over.is_set)
    watcher = threading.Thread(target=lambda: (eventually(lambda: noted(training), what="the first piece on record"), over.set()))
    watcher.start()
    try:
        return uploader.upload_part(training.job, training.run.id, 1, 0)
    finally:
        watcher.join()
        uploader.close()


class TestRecord:
    """What is on record may be wrong or gone; what the store holds decides."""

    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small_pieces(monkeypatch, 5 * MIB)

    def finished(self, training: Training, data: bytes) -> None:
        uploader = training.uploader()
        with contextlib.closing(uploader):
            assert uploader.upload_part(training.job, training.run.id, 1, 0) == "COMMITTED"
        whole(training, data)

    def test_an_upload_that_somebody_aborted(self, s3: Training) -> None:
        """A bucket's rule cleans up what is old: the successor begins anew, under the same nonce."""
        data = noise(20 * MIB)
        s3.stage(data=data)
        assert stopped_after_first_piece(s3) == "RELEASED"
        assert s3.store.abort_uploads() == 1
        self.finished(s3, data)

    def test_pieces_that_the_record_does_not_know(self, s3: Training, faulty: FaultyS3) -> None:
        """The service has acknowledged more than Redis heard of: nothing of that is sent again."""
        data = noise(20 * MIB)
        s3.stage(data=data)
        assert stopped_after_first_piece(s3) == "RELEASED"
        key = s3.state.keys.transfer(s3.run.id, 1, 0)
        s3.state.redis.hdel(key, *[name for name in s3.state.redis.hkeys(key) if name.isdigit()])
        self.finished(s3, data)
        assert faulty.count("partNumber=") == 4

    def test_a_service_that_lists_no_parts(self, s3: Training, faulty: FaultyS3) -> None:
        """Without the permission to list them, those on record count, with their tags."""
        data = noise(20 * MIB)
        s3.stage(data=data)
        assert stopped_after_first_piece(s3) == "RELEASED"
        there = len(noted(s3))
        faulty.plan("403", times=9, method="GET", path="uploadId=")
        sent = faulty.count("partNumber=")
        self.finished(s3, data)
        assert "403" in faulty.met
        assert faulty.count("partNumber=") == sent + 4 - there

    def test_a_part_of_other_bytes(self, s3: Training, weed: SeaweedServer) -> None:
        """Whoever put it there: the service's checksum of the part, or of the whole, is not ours, and it commits all the same."""
        data = noise(20 * MIB)
        s3.stage(data=data)
        assert stopped_after_first_piece(s3) == "RELEASED"
        upload = s3.state.redis.hget(s3.state.keys.transfer(s3.run.id, 1, 0), "upload")
        with contextlib.closing(weed.client()) as client:
            (found,) = client.list_multipart_uploads(Bucket=weed.bucket)["Uploads"]
            other = noise(5 * MIB, seed=1)
            crc = base64.b64encode(checksum.crc_of(other).to_bytes(8, "big")).decode()
            client.upload_part(Bucket=weed.bucket, Key=found["Key"], UploadId=upload, PartNumber=1, Body=other, ChecksumCRC64NVME=crc)
        assert s3.settled() == "COMMITTED"
        whole(s3, data)

    @pytest.mark.parametrize("how", ["flipped", "cut", "gone", "longer"])
    def test_a_temporary_file_that_is_not_what_it_was(self, training: Training, how: str) -> None:
        """It is read back before it is gone on with: what differs is written again."""
        data = noise(20 * MIB)
        training.stage(data=data)
        assert stopped_after_first_piece(training) == "RELEASED"
        (name,) = temporaries(training)
        (path,) = Path(training.store_url.removeprefix("file://")).rglob(name)
        if how == "gone":
            path.unlink()
        else:
            with path.open("r+b") as file:
                if how == "cut":
                    file.truncate(3 * MIB)
                elif how == "longer":
                    file.truncate(30 * MIB)
                else:
                    file.seek(2 * MIB)
                    file.write(b"?" * 10)
        self.finished(training, data)
        assert temporaries(training) == []

    def test_a_writer_that_is_only_stopped(self, training: Training) -> None:
        """Its temporary file is its own: the successor writes another, and the late one's is gone when it ends."""
        data = noise(20 * MIB)
        training.stage(data=data)
        late = other_uploader(training, fault="upload.mid_put=stop")
        wait_for_stop(late, eventually)
        assert training.settled() == "COMMITTED"
        os.kill(late.pid, signal.SIGCONT)
        assert outcome(late)[1] in {"LOST", "COMMITTED"}
        whole(training, data)
        assert temporaries(training) == []

    def test_a_late_multipart_harms_nobody(self, s3: Training) -> None:
        """Stopped in mid-upload, continued after the commit of its own upload by another: the object stays, nothing stays open."""
        data = noise(20 * MIB)
        s3.stage(data=data)
        late = other_uploader(s3, fault="upload.mid_put=stop")
        wait_for_stop(late, eventually)
        assert s3.settled() == "COMMITTED"
        os.kill(late.pid, signal.SIGCONT)
        assert outcome(late)[1] in {"LOST", "COMMITTED", "RELEASED"}
        whole(s3, data)


def test_an_attempt_without_a_piece_counts(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first piece each time: given up after max_attempts, though the upload was on record."""
    data = noise(20 * MIB)
    training.stage(data=data)
    for _ in range(LIMITS.max_attempts):
        eventually(lambda: training.view().parts[0].lease_until_ms < training.state.server_now_ms(), what="the lapse of the lease")
        status, _ = outcome(other_uploader(training, fault="store.local.before_write=kill"))
        assert status == -signal.SIGKILL
    assert training.settled() == "ABORTED"
    assert "without progress" in training.view().reason
    assert temporaries(training) == []
