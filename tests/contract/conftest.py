"""One SeaweedFS for all contract tests; each test has a folder of its own in the bucket."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.store_contract import LARGE_BYTES
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
