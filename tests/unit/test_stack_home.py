"""The folder of a stack: its record, its locks, its log follower, and what goes to the services."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtr.config import Settings, default_home
from dtr.errors import ConfigError
from dtr.stack.follow import Follower
from dtr.stack.home import Home, Record, Running
from dtr.stack.processes import ProcessId
from dtr.stack.services import Plan, Probe, Service, environment
from dtr.stack.supervisor import restart_delay_s, sweep

SUPERVISOR = ProcessId(pid=1, started_ticks=2, boot="b")
RECORD = Record(
    state="ready",
    host="here",
    url="redis://127.0.0.1:6379/0",
    adopted=False,
    supervisor=SUPERVISOR,
    services=(
        Running(
            name="redis",
            process=ProcessId(pid=4_000_000, started_ticks=5, boot="b"),
            address="127.0.0.1:6379",
            log="/l/redis.log",
            restarts=3,
        ),
    ),
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.make()
    return made


def test_the_home_comes_from_the_environment_or_is_in_the_users_folder():
    """DTR_HOME wins; empty is refused, as an empty setting is everywhere."""
    assert default_home({"DTR_HOME": "/somewhere"}) == Path("/somewhere")
    assert default_home({}) == Path.home() / ".dtr"
    with pytest.raises(ConfigError, match="DTR_HOME is empty"):
        default_home({"DTR_HOME": ""})


def test_a_home_that_cannot_be_made_is_named(tmp_path):
    """A file is in the way; the message has the path and the variable."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/home cannot be used as dtr's home.*DTR_HOME"):
        Home(tmp_path / "file" / "home").make()


def test_a_home_is_its_users_alone(home):
    """It holds the data of a server without password."""
    assert home.path.stat().st_mode & 0o777 == 0o700


def test_a_record_comes_back_as_it_was(home):
    """Written and read, and gone when forgotten."""
    assert home.record() is None
    home.write(RECORD)
    assert home.record() == RECORD
    home.forget()
    home.forget()
    assert home.record() is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", RECORD.encode()[:-20], RECORD.encode().replace('"version": 1', '"version": 2'), '{"version": 1}', "\x00"],
)
def test_a_damaged_record_is_refused(home, text):
    """The message names the file and what to do; no signal is sent to what it may say."""
    (home.path / "stack.json").write_text(text)
    with pytest.raises(ConfigError, match=r"stack\.json is not a record of `dtr up`.*remove it"):
        home.record()


def test_a_lock_is_held_by_one_until_it_is_released(home):
    """Exclusive against exclusive; a second release does nothing."""
    first, second = home.supervising(), home.supervising()
    assert first.take()
    assert home.supervised()
    assert not second.take(within_s=0.1)
    first.release()
    first.release()
    assert not home.supervised()
    assert second.take()
    second.release()


def test_borrowers_share_and_keep_the_supervisor_from_stopping(home):
    """As long as one of them is there, the exclusive lock is not to be had."""
    one, other, supervisor = home.borrowing(), home.borrowing(), home.borrowing()
    assert one.take(shared=True)
    assert other.take(shared=True)
    one.release()
    assert not supervisor.take()
    other.release()
    assert supervisor.take()
    assert not one.take(shared=True)
    supervisor.release()


def test_sweep_ends_nothing_that_is_not_its_own(home):
    """The record's processes are of another boot: they are forgotten, and no signal is sent."""
    home.write(RECORD)
    home.keep(wanted=True)
    assert sweep(home) == []
    assert home.record() is None
    assert not home.kept


def test_restarts_back_off_to_half_a_minute():
    """A service that always ends is started at 0.5, 1, 2, ... 30 s."""
    assert [restart_delay_s(n) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert restart_delay_s(10**9) == 30


def test_a_plan_travels_whole():
    """What the supervisor reads is what was planned."""
    service = Service(name="x", argv=("a", "b c"), address="here", probe=Probe(kind="http", target="h:1/p"), grace_s=1.5)
    plan = Plan(url="redis://:secret@h/0", adopted=True, stages=((service,), (service, service)), notes=("n",))
    assert Plan.parse(plan.encode()) == plan


def test_services_get_every_setting_and_absolute_folders(monkeypatch, tmp_path):
    """They run in another folder, where neither dtr.toml nor a relative path means the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dtr.toml").write_text('staging = "slots"\nstore = "ckpts"\nttl_s = 30\n')
    settings = Settings.load(environ={})
    env = environment(settings, {"PATH": "/bin", "DTR_CONFIG": "dtr.toml"})
    assert env["PATH"] == "/bin"
    assert "DTR_CONFIG" not in env
    assert env["DTR_STAGING"] == str(tmp_path / "slots")
    assert env["DTR_STORE"] == str(tmp_path / "ckpts")
    monkeypatch.chdir("/")
    again = Settings.load(environ=env)
    assert (again.ttl_s, again.redis_url, again.broker_url) == (30, settings.redis_url, None)


def test_a_store_url_is_passed_as_it_is():
    """Only plain paths are made absolute."""
    settings = Settings.load(environ={}, store="s3://bucket/prefix", staging="/s")
    assert environment(settings, {})["DTR_STORE"] == "s3://bucket/prefix"


def test_the_follower_yields_only_new_and_complete_lines(tmp_path):
    """What was there before is old; half a line waits for its end."""
    log = tmp_path / "a.log"
    log.write_text("old\n")
    follower = Follower([("a", log), ("b", tmp_path / "b.log")])
    assert list(follower.lines()) == []
    with log.open("a") as file:
        file.write("one\ntw")
    assert list(follower.lines()) == [("a", "one")]
    with log.open("a") as file:
        file.write("o\n")
    (tmp_path / "b.log").write_text("late\n")
    assert list(follower.lines()) == [("a", "two"), ("b", "late")]


def test_the_follower_goes_on_with_the_successor_of_a_moved_file(tmp_path):
    """As after the rotation in `processes.start`."""
    log = tmp_path / "a.log"
    log.write_text("a long old line\n")
    follower = Follower([("a", log)])
    log.rename(tmp_path / "a.log.1")
    log.write_text("new\n")
    assert list(follower.lines()) == [("a", "new")]


def test_the_record_holds_what_its_readers_are_promised():
    """People and scripts read stack.json: names stay."""
    table = json.loads(RECORD.encode())
    assert set(table) == {"version", "state", "host", "url", "adopted", "supervisor", "services"}
    assert set(table["services"][0]) == {"name", "address", "log", "restarts", "pid", "started_ticks", "boot"}
