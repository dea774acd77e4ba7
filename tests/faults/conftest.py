"""Jobs whose trainers only stage: what uploaders make of them is what the tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import RedisServer
from tests.uploads import Training


@pytest.fixture
def training(valkey: RedisServer, job: str, tmp_path: Path) -> Iterator[Training]:
    """A run of one rank."""
    made = Training(valkey.url, job, tmp_path)
    yield made
    made.close()


@pytest.fixture
def pair(valkey: RedisServer, job: str, tmp_path: Path) -> Iterator[Training]:
    """A run of two ranks on this host."""
    made = Training(valkey.url, job, tmp_path, world_size=2)
    yield made
    made.close()
