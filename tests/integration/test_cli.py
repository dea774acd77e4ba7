"""The command line against a real server and real sessions: what it shows."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from dataclasses import replace
from typing import Any

import pytest

from dtr.cli import main
from dtr.config import Settings
from dtr.runs import World
from dtr.session import Session
from dtr.state.job import JobState
from dtr.state.keys import JOBS, uploader
from tests.commands import together
from tests.servers import valkey_server
from tests.waiting import eventually


@pytest.fixture
def crew(make_session, settings: Settings) -> list[Session]:
    """Three members of one job in a run."""
    sessions = [make_session(f"node-{rank}", rank=rank, world=World(low=3, high=3)) for rank in range(3)]
    together(sessions, lambda session: (session.start(), session.form()))
    return sessions


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


def test_a_damaged_job_is_in_no_other_jobs_way(tmp_path, capsys, monkeypatch, settings):
    """I11: it is shown as damaged, with the reason, where jobs are listed; commands of others go on; its own end with exit 5."""
    monkeypatch.setenv("COLUMNS", "1000")
    with valkey_server(tmp_path / "server") as server:
        raw = JobState(server.url, "other").redis
        raw.set("dtr:{wrong}:meta", "x")
        raw.zadd(JOBS, {"wrong": 1, "a b": 1})
        for command in (["status"], ["workers"]):
            assert main([*command, "--url", server.url, "--job", "other"]) == 0
            assert main([*command, "--url", server.url, "--job", "wrong"]) == 5
            assert "dtr:{wrong}:meta" in capsys.readouterr().err
        assert main(["status", "--url", server.url]) == 0  # nothing that could be meant: the list
        out = capsys.readouterr().out
        assert [line.partition("damaged")[0].strip() for line in out.splitlines() if " damaged" in line] == ["a b", "wrong"]
        assert main(["workers", "--url", server.url]) == 2
        assert "this server has 2 jobs: a b (damaged), wrong (damaged); choose one" in capsys.readouterr().err
        with contextlib.closing(Session(replace(settings, redis_url=server.url, job="other"), worker_id="w")) as session:
            session.start()
            for command in (["status", "--job", "other"], ["status"], ["workers"], ["ckpt", "ls"]):
                assert main([*command, "--json", "--url", server.url]) == 0
                found = json.loads(capsys.readouterr().out)
                assert (found["job"]["job"] if command[0] == "status" else found["job"]) == "other"
            assert main(["status", "--url", server.url]) == 0
        out = capsys.readouterr().out
        assert "wrong (damaged: dtr:{wrong}:meta holds something else than dtr writes: WRONGTYPE" in out
        assert "a b (damaged: dtr:jobs lists what is no job" in out


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
