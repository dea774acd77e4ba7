"""Real servers for every test: one Valkey for the whole run, a fresh one where a test breaks its server."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import fakeredis
import pytest
import redis

from dtr.config import Settings
from dtr.session import Session
from dtr.state.job import JobState
from tests.servers import RedisServer, has_redis, redis_server, valkey_server

# Whoever starts the tests in the background may have these ignored, and children inherit that: Ctrl-C could not be tried then.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_ambient_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the environment of whoever runs it."""
    for name in list(os.environ):
        if name.startswith("DTR_") or name in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The server that tests share; each takes a job name of its own."""
    with valkey_server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def redis7(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis from PATH, where there is one."""
    if not has_redis():
        pytest.skip("no redis-server on PATH (.ci/run installs one)")
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may break."""
    with valkey_server(tmp_path / "own-valkey") as server:
        yield server


@pytest.fixture
def job() -> str:
    """A job that no other test uses."""
    return f"job-{secrets.token_hex(4)}"


@pytest.fixture(params=["valkey", "fakeredis", "redis"])
def job_state(request: pytest.FixtureRequest, job: str) -> Iterator[JobState]:
    """A job's state on each engine that dtr supports, and on the fake that users get for their own tests."""
    if request.param == "fakeredis":
        fake = fakeredis.FakeRedis(server=fakeredis.FakeServer(), decode_responses=True)
        yield JobState("redis://fake:6379/0", job, client=fake)
        fake.close()
        return
    server: RedisServer = request.getfixturevalue("valkey" if request.param == "valkey" else "redis7")
    state = JobState(server.url, job, name="test")
    yield state
    state.close()


@pytest.fixture
def settings(valkey: RedisServer, job: str, tmp_path: Path) -> Settings:
    """Settings of one job on the shared server, with short times."""
    return Settings.load(
        redis_url=valkey.url, job=job, staging=str(tmp_path / "staging"), ttl_s=3.0, beat_interval_s=0.2, settle_s=0.2, form_timeout_s=60.0
    )


@pytest.fixture
def make_session(settings: Settings) -> Iterator[type[Session]]:
    """Makes sessions that are closed at the end, however the test ends."""
    made: list[Session] = []

    def make(worker_id: str, **options: object) -> Session:
        session = Session(options.pop("settings", settings), worker_id=worker_id, **options)  # type: ignore[arg-type]
        made.append(session)
        return session

    yield make  # type: ignore[misc]
    for session in made:
        session.close()


@pytest.fixture
def raw(valkey: RedisServer) -> Iterator[redis.Redis]:
    """A plain client of the shared server, as redis-cli would see it."""
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        yield client
