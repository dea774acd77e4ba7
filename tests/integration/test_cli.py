"""The command line against a real server and real sessions: what it shows, how it ends, and what it survives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from dtr.cli import main
from dtr.config import Settings
from dtr.runs import World
from dtr.session import Session
from dtr.state.job import JobState
from dtr.state.keys import JOBS, uploader
from tests.servers import RedisServer, valkey_server
from tests.waiting import eventually


@pytest.fixture
def crew(make_session, settings: Settings) -> list[Session]:
    """Three members of one job in a run."""
    sessions = [make_session(f"node-{rank}", rank=rank, world=World(low=3, high=3)) for rank in range(3)]
    together(sessions, lambda session: (session.start(), session.form()))
    return sessions


def together(sessions: list[Session], call: Any) -> None:
    threads = [threading.Thread(target=call, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


@pytest.fixture
def dtr(settings: Settings, capsys, monkeypatch):
    """Runs a command on the job of the test, at 80 columns; returns what it printed."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args: str, code: int = 0) -> str:
        assert main([*args, "--url", settings.redis_url, "--job", settings.job]) == code, capsys.readouterr().err
        return capsys.readouterr().out

    return call


def as_json(dtr, *args: str) -> Any:
    return json.loads(dtr(*args, "--json"))


def start(args: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "dtr", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# --- status ---------------------------------------------------------------------------------------------------------


def test_status_of_a_job_that_runs(crew, dtr):
    """One page: the verdict, each rank, the missing uploader, no commit yet; nothing wider than the screen."""
    out = dtr("status")
    assert "RUNNING" in out
    assert f"run {crew[0].run.id}: 3 of 3 ranks alive" in out
    assert "no uploader on" in out
    assert "no commit yet" in out
    assert max(map(len, out.splitlines())) <= 80
    page = as_json(dtr, "status")
    assert page["chosen"] == "as asked"
    assert [(worker["rank"], worker["worker"], worker["condition"]) for worker in page["job"]["workers"]] == [
        (0, "node-0", "alive"), (1, "node-1", "alive"), (2, "node-2", "alive"),
    ]  # fmt: skip
    assert page["server"]["engine"] == "valkey"


def test_status_tells_who_ended_the_run_and_why(crew, dtr):
    """After a death: which run ended, by whom, for what reason; the others are forming."""
    run = crew[0].run.id
    crew[1].close(reason="signal 9")
    page = as_json(dtr, "status")["job"]
    assert (page["verdict"], page["run"], page["last_run"]) == ("forming", "", run)
    assert {**page["ended"], "ago_s": 0} == {"run": run, "worker": "node-1", "rank": 1, "reason": "signal 9", "ago_s": 0}
    assert "last end     run" in dtr("status")


def test_status_of_a_dead_job(crew, dtr, settings):
    """Everybody gone: the word is DEAD, and the first failure is named."""
    crew[2].close(reason="signal 9")
    for session in crew:
        session.close(reason="exit 1")
    out = dtr("status")
    assert "DEAD" in out
    assert "rank 2 (node-2) departed" in out


def test_status_shows_an_open_round_and_who_is_missing(crew, dtr):
    """Two of three wait at a barrier: the round is shown with the name of the third."""
    waiting = [threading.Thread(target=session.barrier, args=("epoch",)) for session in crew[:2]]
    for thread in waiting:
        thread.start()
    rounds = eventually(lambda: [found for found in as_json(dtr, "barriers")["rounds"] if found["arrived"] == 2], what="two arrivals")
    assert [seat["worker"] for seat in rounds[0]["missing"]] == ["node-2"]
    assert "epoch round 0: 2 of 3 there" in dtr("status")
    crew[2].barrier("epoch")
    for thread in waiting:
        thread.join(30)
    assert as_json(dtr, "barriers")["rounds"] == []
    assert as_json(dtr, "barriers", "--all")["rounds"][0]["state"] == "RELEASED"


def test_a_barrier_that_timed_out_is_listed_with_its_reason(crew, dtr):
    """A failed round stays to be seen for an hour."""
    from dtr.errors import BarrierTimeout

    with pytest.raises(BarrierTimeout):
        crew[0].barrier("late", timeout_s=0.1)
    found = as_json(dtr, "barriers")["rounds"]
    assert [(one["name"], one["state"], len(one["missing"])) for one in found] == [("late", "TIMEDOUT", 2)]
    assert "1 (node-1), 2 (node-2)" in dtr("barriers")


def test_an_uploader_that_is_present_is_no_warning(crew, dtr, raw):
    """The presence key of the host silences the warning."""
    raw.hset(uploader(crew[0].host), mapping={"pid": "1"})
    page = as_json(dtr, "status")["job"]
    assert [found["present"] for found in page["uploaders"]] == [True]
    assert not any("uploader" in warning for warning in page["warnings"])


def test_status_of_a_job_that_nobody_joined(dtr):
    """An unknown name is no error, but says so."""
    assert "UNKNOWN" in dtr("status")
    assert as_json(dtr, "status")["job"]["phase"] == ""


def test_status_without_a_job_shows_the_only_one_alive(tmp_path, capsys, monkeypatch, settings):
    """On a server with one living job among several, --job may be left out; with two, they are listed and none is guessed."""
    monkeypatch.chdir(tmp_path)
    with valkey_server(tmp_path / "server") as server:
        assert main(["status", "--json", "--url", server.url]) == 0
        assert json.loads(capsys.readouterr().out)["chosen"].startswith("the default")
        first, second = (Session(replace(settings, redis_url=server.url, job=job), worker_id="w") for job in ("alpha", "team/beta"))
        try:
            first.start()
            JobState(server.url, "gone").redis.zadd(JOBS, {"gone": 1})
            assert main(["status", "--json", "--url", server.url]) == 0
            page = json.loads(capsys.readouterr().out)
            assert (page["job"]["job"], page["chosen"]) == ("alpha", "the only one alive")
            assert main(["workers", "--json", "--url", server.url]) == 0
            assert json.loads(capsys.readouterr().out)["job"] == "alpha"
            second.start()
            assert main(["status", "--json", "--url", server.url]) == 0
            page = json.loads(capsys.readouterr().out)
            assert page["job"] is None
            assert [job["job"] for job in page["jobs"]] == ["team/beta", "alpha", "gone"]
            assert main(["status", "--url", server.url]) == 0
            assert "dtr status --job JOB" in capsys.readouterr().out
            assert main(["workers", "--url", server.url]) == 2
            assert "choose one with --job" in capsys.readouterr().err
            monkeypatch.setenv("DTR_JOB", "team/beta")
            assert main(["workers", "--json", "--url", server.url]) == 0
            assert json.loads(capsys.readouterr().out)["job"] == "team/beta"
        finally:
            first.close()
            second.close()


def test_status_warns_of_a_server_that_forgets(tmp_path, capsys):
    """No append-only file, an eviction policy, memory nearly full: each with what to do."""
    args = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with valkey_server(tmp_path / "server", args=args) as server:
        assert main(["status", "--json", "--url", server.url]) == 0
    warned = " ".join(json.loads(capsys.readouterr().out)["server"]["warnings"])
    assert "maxmemory-policy is allkeys-lru" in warned
    assert "append-only file" in warned


def test_a_user_with_few_rights_sees_the_rest_of_the_page(crew, settings, valkey, raw, capsys):
    """Without INFO, SCAN and other tenants' keys: the job is shown, and what is unknown is called so."""
    raw.execute_command(
        "ACL", "SETUSER", "watcher", "on", ">pw", "-@all", "+@read", "+@connection", "+@transaction", "+time", "-scan", "-keys",
        "resetkeys", f"~dtr:{{{settings.job}}}:*", "~dtr:uploader:*",
    )  # fmt: skip
    url = settings.redis_url.replace("redis://", "redis://watcher:pw@")
    assert main(["status", "--json", "--url", url, "--job", settings.job]) == 0
    page = json.loads(capsys.readouterr().out)
    assert page["job"]["verdict"] == "running"
    assert page["job"]["barriers"] is None
    assert "may not run INFO" in page["server"]["warnings"][0]
    assert main(["barriers", "--url", url, "--job", settings.job]) == 4
    assert "refuses" in capsys.readouterr().err
    raw.execute_command("ACL", "DELUSER", "watcher")


# --- workers, ring, events, data ------------------------------------------------------------------------------------


def test_workers_shows_progress_and_departures(crew, dtr):
    """Rank, step, phase, host and process of members; the departed with their reason."""
    crew[0].page.write(41, "evaluating", 0.5)
    seen = eventually(
        lambda: next((w for w in as_json(dtr, "workers")["workers"] if w["rank"] == 0 and w["step"] == 41), None), what="a beat"
    )
    assert (seen["phase"], seen["loss"], seen["host"], seen["pid"]) == ("evaluating", 0.5, crew[0].host, os.getpid())
    crew[2].close(reason="exit 3")
    found = as_json(dtr, "workers")
    assert [worker["worker"] for worker in found["workers"]] == ["node-0", "node-1"]
    assert [(gone["worker"], gone["rank"], gone["reason"], gone["returned"]) for gone in found["departed"]] == [
        ("node-2", 2, "exit 3", False)
    ]
    assert "exit 3" in dtr("workers")


def test_a_key_of_the_wrong_type_is_exit_5(crew, dtr, raw, settings, capsys):
    """The key is named; nobody gets a traceback or half a page."""
    raw.delete(f"dtr:{{{settings.job}}}:departed")
    raw.set(f"dtr:{{{settings.job}}}:departed", "x")
    assert main(["workers", "--url", settings.redis_url, "--job", settings.job]) == 5
    err = capsys.readouterr().err
    assert f"dtr:{{{settings.job}}}:departed" in err
    raw.delete(f"dtr:{{{settings.job}}}:departed")


@pytest.mark.parametrize(
    ("command", "key", "field", "value"),
    [("workers", "departed", "w", "no time"), ("status", "meta", "beat_at", "yesterday"), ("status", "meta", "latest", "0001-a:7")],
)
def test_a_field_that_is_no_number_is_exit_5(crew, command, key, field, value, raw, settings, capsys):
    """The key and the field are named."""
    raw.hset(f"dtr:{{{settings.job}}}:{key}", field, value)
    assert main([command, "--url", settings.redis_url, "--job", settings.job]) == 5
    err = capsys.readouterr().err
    assert f"dtr:{{{settings.job}}}:{key}" in err
    assert err.count("\n") == 1


def test_ring_shares_add_up(crew, dtr):
    """Shares of all workers make the whole ring; with --points, each worker stands there 150 times, in order."""
    found = as_json(dtr, "ring", "--points")
    assert abs(sum(worker["share"] for worker in found["workers"]) - 1) < 1e-5
    points = [point["point"] for point in found["points"]]
    assert points == sorted(points)
    assert len(points) == found["stored"] == found["expected"] == 450
    assert {(point["worker"], point["node"]) for point in found["points"]} == {(f"node-{w}", n) for w in range(3) for n in range(150)}


def test_ring_agrees_with_redis(crew, dtr, raw, settings):
    """The points that are shown are those of the sorted set, which people see in redis-cli."""
    shown = {f"{point['worker']}#{point['node']}": point["point"] for point in as_json(dtr, "ring", "--points")["points"]}
    assert shown == {name: int(score) for name, score in raw.zrange(f"dtr:{{{settings.job}}}:ring", 0, -1, withscores=True)}


def test_events_are_the_newest_in_order(crew, dtr):
    """-n limits, from the end; the last event of a fresh run is its forming."""
    assert [event["event"] for event in as_json(dtr, "events")["events"]][:2] == ["state_created", "state_ready"]
    assert [event["event"] for event in as_json(dtr, "events", "-n", "1")["events"]] == ["run_formed"]
    assert as_json(dtr, "events", "-n", "0")["events"] == []
    assert f"{crew[0].run.id} with 3 ranks" in dtr("events")


@pytest.mark.parametrize("command", ["status", "workers", "barriers", "ring", "events", "data ls", "ckpt ls"])
def test_an_empty_job_is_valid_json(dtr, command):
    """Nothing there is no error and no special case for a program."""
    assert isinstance(as_json(dtr, *command.split()), dict)
    assert dtr(*command.split())


@pytest.mark.parametrize("width", ["20", "40", "80", "200"])
@pytest.mark.parametrize("command", ["status", "workers", "barriers", "ring", "events", "config show"])
def test_no_line_is_wider_than_the_screen(crew, dtr, monkeypatch, width, command):
    """On any width, with whatever is there to be shown."""
    crew[2].close(reason="a rather long reason that has to be wrapped or cut somewhere on a narrow screen")
    monkeypatch.setenv("COLUMNS", width)
    assert max(map(len, dtr(*command.split()).splitlines())) <= int(width)


# --- how it ends ----------------------------------------------------------------------------------------------------


@pytest.fixture
def follower(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """`dtr events --follow --json` on the job of the test."""
    process = start(["events", "--follow", "--json", "--url", settings.redis_url, "--job", settings.job])
    yield process
    process.kill()
    process.communicate()


def read_until(process: subprocess.Popen[str], kind: str) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(json.loads(line))
        if seen[-1]["event"] == kind:
            return seen
    raise AssertionError(f"it ended: {process.stderr.read() if process.stderr else ''}")


def test_follow_shows_what_happens_and_ends_by_ctrl_c(crew, follower):
    """Events as they come, each once, one JSON document a line; SIGINT is exit 130 without a traceback."""
    first = read_until(follower, "run_formed")
    crew[2].close(reason="signal 9")
    then = read_until(follower, "run_ended")
    assert [event["event"] for event in then] == ["departed", "run_ended"]
    ids = [event["id"] for event in first + then]
    assert len(set(ids)) == len(ids)
    follower.send_signal(signal.SIGINT)
    assert follower.wait(10) == 130
    assert follower.stderr is not None
    assert "Traceback" not in follower.stderr.read()


@pytest.mark.parametrize("kept", [True, False])
def test_follow_survives_a_restart_of_redis(kept, tmp_path):
    """It says that Redis is away and back, and goes on; with an emptied server it reads the new stream from its beginning."""
    server = RedisServer("valkey", tmp_path / "server", args=("--appendonly", "yes" if kept else "no"))
    with server:
        state = JobState(server.url, "j", name="test")
        state.redis.xadd(state.keys.events, {"event": "first"})
        process = start(["events", "--follow", "--json", "--url", server.url, "--job", "j"])
        try:
            read_until(process, "first")
            server.kill()
            assert process.stderr is not None
            assert "cannot be reached" in process.stderr.readline()
            server.start()
            assert "answers again" in process.stderr.readline()
            if not kept:  # as if the server's clock went back
                state.redis.xadd(state.keys.events, {"event": "early"}, id="5-1")
                assert [event["event"] for event in read_until(process, "early")] == ["early"]
            state.redis.xadd(state.keys.events, {"event": "second"})
            assert [event["event"] for event in read_until(process, "second")] == ["second"]
        finally:
            process.kill()
            process.communicate()
            state.close()


def test_a_closed_pipe_ends_quietly(settings, raw):
    """`dtr events | head -1` leaves nothing on stderr, and dtr does not go on for nobody."""
    key = f"dtr:{{{settings.job}}}:events"
    pipeline = raw.pipeline()
    for number in range(5000):
        pipeline.xadd(key, {"event": "joined", "n": str(number), "filler": "x" * 200})
    pipeline.execute()
    for extra in ([], ["--json"]):
        process = start(["events", "-n", "5000", "--url", settings.redis_url, "--job", settings.job, *extra])
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=30)
        assert err == ""
        assert process.returncode == 1


@pytest.mark.parametrize("command", ["status", "workers", "barriers", "ring", "events -f", "data ls", "ckpt ls"])
def test_ctrl_c_while_redis_does_not_answer(command):
    """A server that accepts and stays silent: SIGINT ends every command at once, exit 130, no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = start([*command.split(), "--job", "j", "--url", f"redis://127.0.0.1:{silent.getsockname()[1]}"])
        silent.settimeout(30)
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == ""


def test_a_full_disk_is_one_line(settings):
    """/dev/full: the write fails, and the message says so."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dtr", "config", "show"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "dtr: No space left on device\n"


def test_no_colour_where_none_is_wanted(crew, settings):
    """A pipe gets plain text; so does a terminal with NO_COLOR, and only a terminal without it gets colours."""
    args = ["workers", "--url", settings.redis_url, "--job", settings.job]
    assert "\x1b" not in subprocess.run([sys.executable, "-m", "dtr", *args], capture_output=True, text=True, timeout=30, check=True).stdout
    assert b"\x1b[32m" in on_a_terminal(args, {})
    assert b"\x1b[32m" not in on_a_terminal(args, {"NO_COLOR": "1"})


def on_a_terminal(args: list[str], environ: dict[str, str]) -> bytes:
    import pty

    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environ}
    process = subprocess.Popen([sys.executable, "-m", "dtr", *args], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    out = b""
    try:
        while chunk := os.read(ours, 65536):
            out += chunk
    except OSError:
        pass  # the other end was closed
    os.close(ours)
    assert process.wait(30) == 0
    return out


# --- settings -------------------------------------------------------------------------------------------------------


def test_config_show_tells_where_each_value_comes_from(tmp_path, monkeypatch, capsys):
    """Argument, environment, file and default, with the variable or file; passwords are masked everywhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dtr.toml").write_text('ttl_s = 9\njob = "from-file"\nstore = "/mnt/x"\n')
    monkeypatch.setenv("DTR_JOB", "from-env")
    monkeypatch.setenv("DTR_BROKER_URL", "redis://u:hunter2@broker/1")
    assert main(["config", "show", "--json", "--url", "redis://:hunter2@h/0"]) == 0
    out = capsys.readouterr().out
    assert "hunter2" not in out
    found = {setting["name"]: (setting["value"], setting["origin"], setting["place"]) for setting in json.loads(out)["settings"]}
    assert found["redis_url"] == ("redis://:***@h/0", "argument", "--url")
    assert found["job"] == ("from-env", "environment", "DTR_JOB")
    assert found["ttl_s"] == (9.0, "file", "dtr.toml")
    assert found["slots"] == (2, "default", "")
    assert main(["config", "show"]) == 0
    out = capsys.readouterr().out
    assert "hunter2" not in out
    assert "from DTR_JOB" in out


def test_options_stand_before_or_after_the_command(crew, settings, capsys):
    """--url and --job of the group are defaults of every command; one given after the command wins."""
    for args in (
        ["--url", settings.redis_url, "--job", settings.job, "workers", "--json"],
        ["--url", settings.redis_url, "workers", "--json", "--job", settings.job],
        ["--url", "redis://127.0.0.1:1", "--job", "x", "workers", "--json", "--url", settings.redis_url, "--job", settings.job],
    ):
        assert main(args) == 0
        assert len(json.loads(capsys.readouterr().out)["workers"]) == 3
    assert main(["--url", settings.redis_url, "--job", settings.job, "data", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["job"] == settings.job
