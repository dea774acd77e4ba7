"""The example users of deploy/users.conf may do their work, and nothing more, on each engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from dtr.stack import server
from dtr.state.client import connect
from dtr.state.job import JobState
from dtr.state.keys import Keys, upload_queue
from tests.servers import RedisServer, ServerFailed, free_port, has_redis
from worker_agent import Agent

ACL = Path(__file__).parents[2] / "deploy" / "users.conf"
As = Callable[[str], redis.Redis]


def users(folder: Path, password: str) -> Path:
    """The file as an operator completes it."""
    made = folder / "users.conf"
    made.write_text(ACL.read_text().replace("PUT_SHA256_HERE", hashlib.sha256(password.encode()).hexdigest()))
    return made


@pytest.fixture(scope="module", params=["valkey", "redis"])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that knows the example users, and nobody else."""
    if request.param == "redis" and not has_redis():
        pytest.skip("no redis-server on PATH (.ci/run installs one)")
    folder = tmp_path_factory.mktemp("guarded")
    with RedisServer(request.param, folder / "server", args=["--include", str(users(folder, "pw"))]) as running:
        yield running


@pytest.fixture
def enter(guarded: RedisServer) -> Iterator[As]:
    """Connects as a user."""
    made: list[redis.Redis] = []

    def connected(user: str) -> redis.Redis:
        made.append(connect(url(guarded, user), name="test"))
        return made[-1]

    yield connected
    for client in made:
        client.close()


def url(guarded: RedisServer, user: str) -> str:
    return f"redis://{user}:pw@127.0.0.1:{guarded.port}/0"


def test_the_file_as_shipped_is_refused(tmp_path):
    """Nobody gets in by a password that is printed in a repository."""
    with pytest.raises(ServerFailed, match="Error in user declaration"):
        RedisServer("valkey", tmp_path, port=free_port(), args=["--include", str(ACL)]).start()


def test_an_agent_joins_and_meets(guarded, job, tmp_path):
    """The whole way of a trainer: join, form, barrier, leave; scripts are loaded and streams are read."""
    with Agent(coordinator_url=url(guarded, "dtr-agent"), job=job, world_size=1, staging=str(tmp_path / "staging")) as agent:
        agent.barrier("there")
        agent.step(loss=1.0)
    with JobState(url(guarded, "dtr-agent"), job).redis as client:
        assert client.hexists(Keys(job).departed, agent.worker_id)


@pytest.mark.parametrize("user", ["dtr-agent", "dtr-uploader"])
def test_what_both_do_is_permitted(enter, user, job):
    """Keys of a job, streams read blocking, the queues of uploads, and INFO for `dtr up` and `dtr status`."""
    client, keys = enter(user), Keys(job)
    assert client.hset(keys.meta, "x", "1") == 1
    client.xadd(keys.wake, {"a": "b"})
    assert client.xread({keys.wake: "0"}, block=10)
    assert client.lpush(upload_queue(job), "m") == 1
    assert client.sadd(f"_kombu.binding.{upload_queue(job)}", "b") == 1
    assert client.time()
    assert client.info()["redis_version"]
    assert client.eval("return redis.call('HGET', KEYS[1], 'x')", 1, keys.meta) == "1"


@pytest.mark.parametrize("user", ["dtr-agent", "dtr-uploader"])
@pytest.mark.parametrize(
    "command",
    [
        ("SET", "other-tenant", "1"),
        ("GET", "other-tenant"),
        ("SCAN", "0"),
        ("KEYS", "*"),
        ("RANDOMKEY",),
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("CLIENT", "LIST"),
        ("CLIENT", "KILL", "ID", "1"),
        ("FUNCTION", "LIST"),
        ("SHUTDOWN",),
        ("DEBUG", "SLEEP", "0"),
        ("SCRIPT", "FLUSH"),
        ("EVAL", "return redis.call('GET', 'other-tenant')", "0"),
    ],
    ids=" ".join,
)
def test_what_is_anothers_is_not_permitted(enter, user, command):
    """Neither keys outside, nor a look at other tenants, nor the server itself."""
    with pytest.raises(redis.ResponseError, match="permission|can't access"):
        enter(user).execute_command(*command)


def test_without_a_password_nobody_gets_in(guarded):
    """The default user is off."""
    with connect(guarded.url, name="test", retries=0) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_a_server_is_recognised_by_a_user_who_may_not_ask_for_info(tmp_path):
    """`dtr run` adopts it all the same: a PING is enough."""
    with RedisServer("valkey", tmp_path) as running:
        with redis.Redis(port=running.port) as client:
            client.execute_command("ACL", "SETUSER", "mute", "on", ">pw", "-@all", "+ping", "+client|setname")
        assert server.look(f"redis://mute:pw@127.0.0.1:{running.port}/0") == {}
