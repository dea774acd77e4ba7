"""The local stack with real processes: it comes up once, ends whole, and is shared by those who borrow it.

Uploader and Flower are stand-ins here, so that these tests judge the supervision alone; ``test_stack_celery.py`` has the real ones.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from dtr.config import Settings
from dtr.errors import ConfigError, CoordinatorRefused, CoordinatorUnavailable, ServiceFailed, Unavailable
from dtr.stack import Home, Record, Stack, Up, processes
from dtr.stack.services import Plan, Probe, Service, redis_service
from dtr.stack.stack import make_plan
from tests.servers import RedisServer, free_port
from tests.waiting import eventually

SLEEP = "import time; print('at work', flush=True); time.sleep(600)"


def stand_in(name: str, url: str, code: str = SLEEP) -> Service:
    """A service that is ready as soon as the server is."""
    return Service(name=name, argv=(sys.executable, "-c", code), address="stand-in", probe=Probe(kind="ping", target=url), grace_s=5)


class Bench:
    """One home, one port, and stacks on them."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder / "home")
        self.settings = Settings.load(redis_url=f"redis://127.0.0.1:{free_port()}/0", staging=str(folder / "staging"))
        self.uploader = SLEEP

    @property
    def url(self) -> str:
        return self.settings.redis_url

    def stack(self) -> Stack:
        return Stack(self.home.path, self.settings, planner=self._plan)

    def _plan(self, home: Home, settings: Settings, *, flower: bool) -> Plan:
        plan = make_plan(home, settings, flower=False)
        return dataclasses.replace(plan, stages=(*plan.stages[:-1], (stand_in("uploader", settings.redis_url, self.uploader),)))

    def record(self) -> Record:
        found = self.stack().status()
        assert found is not None
        return found

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, decode_responses=True)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A bench whose stack is ended, and seen to leave nothing, however the test ends."""
    made = Bench(tmp_path)
    yield made
    made.stack().down()
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and _belongs(int(pid), made.home.path)]
    assert left == []


def _belongs(pid: int, home: Path) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/cwd").startswith(str(home)) and pid != os.getpid()
    except OSError:
        return False


def gone(record: Record) -> bool:
    return not any(map(processes.alive, [record.supervisor, *(service.process for service in record.services)]))


def borrower(bench: Bench) -> subprocess.Popen[str]:
    """Another process that borrows the stack until its stdin ends, as `dtr run` does; it has said "up" when this returns."""
    code = f"""
import sys
from pathlib import Path
from dtr.config import Settings
from tests.integration.test_stack import Bench
bench = Bench.__new__(Bench)
bench.__dict__.update(settings=Settings.load(redis_url={bench.url!r}, staging={bench.settings.staging!r}), uploader={bench.uploader!r})
from dtr.stack import Home
bench.home = Home(Path({str(bench.home.path)!r}))
with bench.stack().borrowed() as found:
    print("up", found.started, flush=True)
    sys.stdin.read()
print("left", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("up")
    return child


def leave(child: subprocess.Popen[str]) -> None:
    output, _ = child.communicate(timeout=60)
    assert "left" in output


def test_up_twice_is_one_stack_and_down_ends_it(bench):
    """The second up changes nothing, the second down finds nothing; what the server held is there again."""
    first = bench.stack().up()
    assert first.started
    assert [service.name for service in first.record.services] == ["redis", "uploader"]
    bench.client().set("kept", "yes")
    second = bench.stack().up()
    assert not second.started
    assert second.record == first.record
    assert bench.stack().down().stopped == ("redis", "uploader")
    assert gone(first.record)
    assert bench.stack().status() is None
    assert bench.stack().down().stopped == ()
    bench.stack().up()
    assert bench.client().get("kept") == "yes"


def test_down_without_a_home_makes_none(tmp_path):
    """Asking to end what never was leaves no folder behind."""
    stack = Stack(tmp_path / "never", Settings.load())
    assert stack.down().stopped == ()
    assert stack.status() is None
    assert not (tmp_path / "never").exists()


def test_the_server_is_set_up_as_the_file_says(bench):
    """It keeps what it acknowledged, evicts nothing, and listens on this machine only."""
    bench.stack().up()
    config = bench.client().config_get("*")
    wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "protected-mode": "yes"}
    assert {name: config[name] for name in wanted} == wanted
    assert config["bind"] == "127.0.0.1"
    assert config["dir"] == str(bench.home.data)


def test_a_server_that_answers_is_adopted_and_never_stopped(bench, own_valkey):
    """`down` ends the uploader and leaves the server; what is unsafe about it is said."""
    bench.settings = dataclasses.replace(bench.settings, redis_url=own_valkey.url)
    found = bench.stack().up()
    assert found.record.adopted
    assert [service.name for service in found.record.services] == ["uploader"]
    assert any("append-only" in note for note in found.notes)
    ended = bench.stack().down()
    assert ended.stopped == ("uploader",)
    assert ended.adopted == own_valkey.url
    assert bench.client().ping()


def test_a_server_that_wants_a_password_is_refused_not_replaced(bench, tmp_path):
    """Nothing is started beside it."""
    with RedisServer("valkey", tmp_path / "locked", args=["--requirepass", "hush"]) as server:
        bench.settings = dataclasses.replace(bench.settings, redis_url=f"redis://127.0.0.1:{server.port}/0")
        with pytest.raises(CoordinatorRefused, match=r"NOAUTH|[Aa]uthentication"):
            bench.stack().up()
    assert bench.stack().status() is None


def test_a_password_is_nowhere_to_be_read(bench, tmp_path):
    """Not on disk, not in a command line; the services get it in their environment."""
    with RedisServer("valkey", tmp_path / "locked", args=["--requirepass", "hush-9f2"]) as server:
        bench.settings = dataclasses.replace(bench.settings, redis_url=f"redis://:hush-9f2@127.0.0.1:{server.port}/0")
        bench.uploader = "import os, time; print(len(os.environ['DTR_REDIS_URL']), flush=True); time.sleep(600)"
        record = bench.stack().up().record
        said = eventually(lambda: bench.home.log("uploader").read_text(), what="the uploader's output")
        assert int(said) == len(bench.settings.redis_url)
        for process in (record.supervisor, *(service.process for service in record.services)):
            assert b"hush" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        for path in bench.home.path.rglob("*"):
            assert path.is_dir() or b"hush" not in path.read_bytes(), path
        bench.stack().down()


def test_something_else_on_the_port_is_named(bench):
    """A web server is not taken for Redis, and Redis is not started on its port."""
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            connection.close()
            connection, _ = other.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        port = other.getsockname()[1]
        bench.settings = dataclasses.replace(bench.settings, redis_url=f"redis://127.0.0.1:{port}/0")
        with pytest.raises(CoordinatorUnavailable, match="does not answer as Redis does"):
            bench.stack().up()


def test_no_server_is_started_for_a_url_that_is_not_ours_to_serve(bench):
    """An empty server in place of a real one would be worse than none."""
    bench.settings = dataclasses.replace(bench.settings, redis_url=bench.url.replace("redis://", "redis://:secret@"))
    with pytest.raises(CoordinatorUnavailable, match=r"nothing answers at redis://:\*\*\*@127") as raised:
        bench.stack().up()
    assert "secret" not in str(raised.value)


def test_up_at_another_url_is_refused(bench):
    """One home holds one stack; the message says where it is and what to do."""
    bench.stack().up()
    other = Stack(bench.home.path, dataclasses.replace(bench.settings, redis_url="redis://127.0.0.1:1/0"))
    with pytest.raises(ConfigError, match=rf"up at {bench.url}, not at redis://127\.0\.0\.1:1/0: `dtr down` first"):
        other.up()


def test_a_service_that_cannot_start_ends_everything(bench):
    """The error has the end of its log, and the server that was up already is stopped."""
    bench.uploader = "import sys; sys.exit('no such module: tasks')"

    def never_ready(home: Home, settings: Settings, *, flower: bool) -> Plan:
        broken = dataclasses.replace(stand_in("uploader", bench.url, bench.uploader), probe=Probe(kind="http", target="127.0.0.1:1/"))
        return Plan(url=bench.url, adopted=False, stages=((redis_service(home, bench.url),), (broken,)))

    with pytest.raises(
        ServiceFailed, match=r"uploader ended with status 1; the last line of .*uploader\.log: no such module: tasks"
    ) as raised:
        Stack(bench.home.path, bench.settings, planner=never_ready).up()
    assert "\n" not in raised.value.message
    assert "no such module" in raised.value.tail
    assert bench.stack().status() is None
    with pytest.raises(redis.ConnectionError):
        bench.client().ping()


def test_a_server_that_dies_at_its_start_shows_why(bench):
    """Its own log explains it: here its data folder is a file."""
    bench.home.make()
    bench.home.data.mkdir()
    (bench.home.data / "appendonlydir").write_text("in the way")
    with pytest.raises(ServiceFailed, match=r"redis ended with status 1.*appendonlydir"):
        bench.stack().up()


def test_a_service_that_ends_is_started_again(bench):
    """Uploader and server alike, each with a new process; the record counts it."""
    before = {service.name: service.process for service in bench.stack().up().record.services}
    bench.client().set("kept", "yes")
    for name, process in before.items():
        os.kill(process.pid, signal.SIGKILL)

        def again(name: str = name) -> bool:
            now = {service.name: service for service in bench.record().services}[name]
            return now.restarts == 1 and processes.alive(now.process)

        eventually(again, what=f"the restart of {name}")
        assert {s.name: s.process for s in bench.record().services}[name] != process
    eventually(lambda: _answers(bench), what="the new server")
    assert bench.client().get("kept") == "yes"


def _answers(bench: Bench) -> bool:
    try:
        return bool(bench.client().ping())
    except redis.RedisError:
        return False


def test_the_death_of_the_supervisor_ends_its_services(bench):
    """SIGKILL leaves it no time to do anything; the next up begins anew."""
    record = bench.stack().up().record
    os.kill(record.supervisor.pid, signal.SIGKILL)
    eventually(lambda: gone(record), what="the end of the services")
    assert bench.stack().up().started


def test_what_survived_its_supervisor_is_ended_by_down(bench, monkeypatch):
    """A service that ignores the SIGTERM of its parent's death is on record, and gets SIGKILL."""
    bench.uploader = "import signal, time; signal.signal(15, signal.SIG_IGN); print('armed', flush=True); time.sleep(600)"
    record = bench.stack().up().record
    eventually(lambda: "armed" in bench.home.log("uploader").read_text(), what="the handler of the uploader")
    os.kill(record.supervisor.pid, signal.SIGKILL)
    eventually(lambda: not processes.alive(record.supervisor), what="the end of the supervisor")
    stubborn = next(service for service in record.services if service.name == "uploader")
    assert processes.alive(stubborn.process)
    monkeypatch.setattr("dtr.stack.supervisor._SWEEP_GRACE_S", 0.2)  # the real grace is long; a test need not wait for it
    assert "uploader" in bench.stack().down().stopped
    assert gone(record)


def test_a_borrowed_stack_lives_as_long_as_its_borrowers(bench):
    """The one who started it leaves first and the other is not disturbed; with the last one it ends."""
    first, second = borrower(bench), borrower(bench)
    record = bench.record()
    leave(first)
    assert bench.record() == record
    assert bench.client().ping()
    leave(second)
    assert gone(record)
    assert bench.stack().status() is None


def test_a_borrower_that_is_killed_has_left(bench):
    """Nobody is there to say goodbye, and the stack ends all the same."""
    child = borrower(bench)
    record = bench.record()
    child.kill()
    child.communicate()
    eventually(lambda: gone(record), what="the end of the stack")


def test_up_has_a_borrowed_stack_stay(bench):
    """`dtr up --detach` beside a `dtr run` takes its stack over."""
    child = borrower(bench)
    record = bench.record()
    assert not bench.stack().up().started
    leave(child)
    assert bench.record() == record
    bench.stack().down()
    assert gone(record)


def test_concurrent_ups_make_one_stack(bench):
    """All find the same processes, and exactly one says that it started them."""
    results: list[Up] = []

    def up() -> None:
        results.append(bench.stack().up())

    threads = [threading.Thread(target=up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    assert sum(found.started for found in results) == 1
    assert len({found.record for found in results}) == 1


def test_down_while_it_starts_ends_it(bench):
    """A service is waited for that never answers; `down` does not wait for its time limit."""

    def never_ready(home: Home, settings: Settings, *, flower: bool) -> Plan:
        slow = dataclasses.replace(stand_in("uploader", bench.url), probe=Probe(kind="http", target="127.0.0.1:1/"))
        return Plan(url=bench.url, adopted=False, stages=((redis_service(home, bench.url),), (slow,)))

    raised: list[BaseException] = []

    def up() -> None:
        try:
            Stack(bench.home.path, bench.settings, planner=never_ready).up()
        except Unavailable as exc:
            raised.append(exc)

    thread = threading.Thread(target=up)
    thread.start()
    record = eventually(lambda: _with_uploader(bench), what="the uploader on record")
    assert record is not None
    bench.stack().down()
    thread.join(60)
    assert gone(record)
    assert [type(exc) for exc in raised] == [ServiceFailed]


def _with_uploader(bench: Bench) -> Record | None:
    record = bench.stack().status()
    return record if record is not None and len(record.services) == 2 else None
