"""The launcher with real processes: what trainers get, how they end, what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.slots import finish
from dtr.config import Settings
from dtr.errors import CoordinatorRefused, CoordinatorUnavailable
from dtr.state.keys import Keys
from tests.launched import ROOT, Launcher, launching
from tests.servers import RedisServer, free_port, valkey_server
from tests.staged import record, stage, staged
from tests.waiting import eventually
from worker_agent.launcher.ground import finish_uploads, standing

Launch = Callable[..., Launcher]

ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.fixture
def launch(valkey: RedisServer, job: str, tmp_path: Path) -> Iterator[Launch]:
    """Starts launchers of one job on the shared server."""
    with launching(valkey, job, tmp_path) as start:
        yield start


def environments(launcher: Launcher) -> list[dict[str, str]]:
    return sorted((json.loads(line) for line in launcher.out.splitlines()), key=lambda env: int(env["LOCAL_RANK"]))


def events(raw: redis.Redis, job: str, kind: str) -> list[dict[str, str]]:
    found: Any = raw.xrange(Keys(job).events)
    return [fields for _, fields in found if fields.get("event") == kind]


# --- what trainers get ----------------------------------------------------------------------------------------------


def test_each_trainer_gets_its_place(launch: Launch, valkey: RedisServer, tmp_path: Path) -> None:
    """RANK, WORLD_SIZE, LOCAL_RANK and the DTR_ variables are right for each of three, and their names are those of the host."""
    launcher = launch("-n", "3", "--min", "2", "-q", "--", sys.executable, "-c", ENVIRONMENT)
    assert launcher.wait() == 0
    found = environments(launcher)
    host = (tmp_path / "staging" / ".host-id").read_text().strip()
    for rank, env in enumerate(found):
        assert {k: env[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DTR_WORLD_MIN", "DTR_RESTARTS")} == {
            "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3",
            "DTR_WORLD_MIN": "2", "DTR_RESTARTS": "0",
        }  # fmt: skip
        assert (env["DTR_WORKER_ID"], env["DTR_REDIS_URL"]) == (f"{host}-{rank}", valkey.url)
        assert env["DTR_STAGING"] == str(tmp_path / "staging")
    assert len({env["DTR_LAUNCHER"] for env in found}) == 3


def test_two_launchers_of_one_job_on_one_host_form_one_run(launch: Launch) -> None:
    """--nnodes 2, started twice: four trainers with four names, no RANK in their environment, ranks 0 to 3 from forming."""
    launchers = [launch("-n", "2", "--nnodes", "2") for _ in range(2)]
    formed = [launcher.wait_for("formed", rank=n) for launcher in launchers for n in range(2)]
    assert sorted(line["rank"] for line in formed) == [0, 1, 2, 3]
    assert {line["world_size"] for line in formed} == {4}
    assert len({line["worker"] for line in formed}) == 4
    assert len({line["run"] for line in formed}) == 1
    for launcher in launchers:
        launcher.stop_trainers()
    assert {launcher.wait() for launcher in launchers} <= {0}


def test_names_are_the_same_when_the_launcher_is_started_again(launch: Launch) -> None:
    """After an orderly end, and after SIGKILL of the launcher: the next one finds its place free."""
    command = ("-n", "1", "-q", "--", sys.executable, "-c", ENVIRONMENT)
    first = launch(*command)
    first.wait()
    killed = launch("-n", "1", "--", "sleep", "60")
    eventually(killed.left, what="a trainer")
    killed.signal(signal.SIGKILL)
    killed.process.wait()
    again = launch(*command)
    again.wait()
    assert environments(first)[0]["DTR_WORKER_ID"] == environments(again)[0]["DTR_WORKER_ID"]


def test_output_of_several_is_labelled_and_whole(launch: Launch) -> None:
    """Each line begins with its rank, on stdout and stderr alike; a last line without end gets one."""
    launcher = launch("-n", "2", "--", "sh", "-c", "echo one; echo two >&2; printf three")
    assert launcher.wait() == 0
    assert sorted(launcher.out.splitlines()) == ["[0] one", "[0] three", "[1] one", "[1] three"]
    assert {"[0] two", "[1] two"} <= set(launcher.err.splitlines())


def test_one_trainer_has_the_terminal_to_itself(valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """With -n 1, stdin, stdout and stderr are the launcher's own, byte for byte."""
    data = bytes(range(256)) * 100
    env = {**os.environ, "DTR_REDIS_URL": valkey.url, "DTR_JOB": job, "DTR_STAGING": str(tmp_path / "staging")}
    found = subprocess.run(
        [sys.executable, "-m", "worker_agent", "run", "--no-uploader", "--", "cat"],
        cwd=ROOT,
        env=env,
        input=data,
        capture_output=True,
        timeout=60,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, data, b"")


def test_dtr_run_is_the_launcher(valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """The command of the CLI becomes the launcher: same process, its output, its status, and the folder's own modules do not harm it."""
    (tmp_path / "queue.py").write_text("raise RuntimeError('the wrong queue')")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DTR_STAGING": str(tmp_path / "staging")}
    script = "import sys; sys.path.remove(''); from dtr.cli import main; sys.exit(main())"
    # Rank 1 fails, which ends rank 0: not before that has spoken.
    command = "[ $RANK = 0 ] || until [ -e spoken ]; do sleep 0.1; done; echo $DTR_JOB $RANK $DTR_STORE; touch spoken; exit $RANK"
    options = ["run", "-n", "2", "--no-uploader", "--url", valkey.url, "--job", job, "--store", "/there", "--", "sh", "-c", command]
    found = subprocess.run([sys.executable, "-c", script, *options], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert sorted(found.stdout.splitlines()) == [f"[0] {job} 0 /there", f"[1] {job} 1 /there"]
    assert found.returncode == 1
    assert "rank 1" in found.stderr
    assert "ended with exit status 1" in found.stderr


# --- how they end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--", "true"], 0, ""),
        (["-n", "2", "--", "sh", "-c", "exit $((RANK * 7))"], 7, "ended with exit status 7"),
        (["--", "sh", "-c", "kill -9 $$"], 137, "was killed by signal 9 (SIGKILL)"),
        (["--", "no-such-program"], 127, "command not found: no-such-program"),
        (["--", "/etc/passwd"], 126, "not an executable file"),
        (["--url", "redis://127.0.0.1:1/0", "--", "true"], 4, "cannot be reached, and none is started in its place: it was named by --url"),
        (["--url", "http://127.0.0.1/", "--", "true"], 3, "unknown scheme"),
        (["--job", "a b", "--", "true"], 3, "job must be"),
        (["--store", "ftp://there", "--", "true"], 3, "store"),
        (["-n", "2", "--min", "3", "--", "true"], 3, "min must be"),
        (["-n", "x", "--", "true"], 2, "-n/--nproc"),
    ],
)
def test_the_status_says_how_it_ended(launch: Launch, options: list[str], status: int, words: str) -> None:
    """The job's status, or that of what stood in its way; one clear line, no traceback."""
    launcher = launch(*options)
    assert launcher.wait() == status
    assert words in launcher.err
    assert "Traceback" not in launcher.err


def test_a_failing_trainer_is_named_and_ends_the_others(launch: Launch) -> None:
    """Without restarts: SIGTERM to the rest, which may end in peace; the status is the failing one's; nothing is left."""
    script = 'if [ $RANK = 1 ]; then sleep 0.3; exit 5; fi; trap "echo bye; exit 0" TERM; while :; do sleep 0.05; done'
    launcher = launch("-n", "3", "--", "bash", "-c", script)
    assert launcher.wait() == 5
    assert "rank 1" in launcher.err
    assert "stopping the others" in launcher.err
    assert sorted(launcher.out.splitlines()) == ["[0] bye", "[2] bye"]
    assert launcher.left() == []


def test_a_restart_is_counted_and_keeps_the_name(launch: Launch, raw: redis.Redis, job: str) -> None:
    """A killed trainer comes back under its name with DTR_RESTARTS 1; the other forms with it again; then all end well."""
    launcher = launch("-n", "2", "--max-restarts", "3")
    launcher.wait_for("formed", count=2)
    victim = launcher.wait_for("formed", rank=1)
    os.kill(victim["pid"], signal.SIGKILL)
    again = launcher.wait_for("formed", rank=1, restarts=1)
    assert again["worker"] == victim["worker"]
    assert again["incarnation"] != victim["incarnation"]
    assert launcher.wait_for("formed", rank=0, count=2)["run"] == again["run"]
    departed = events(raw, job, "departed")[0]
    assert (departed["worker"], departed["reason"]) == (victim["worker"], "signal 9 (SIGKILL)")
    launcher.stop_trainers()
    assert launcher.wait() == 0
    assert "restart 1 of 3" in launcher.err


def test_who_leaves_by_itself_is_not_reported_again(launch: Launch, raw: redis.Redis, job: str) -> None:
    """An agent that closes has said so itself: one departure each, with its own reason."""
    launcher = launch("-n", "2")
    launcher.wait_for("formed", count=2)
    launcher.stop_trainers()
    assert launcher.wait() == 0
    assert sorted(event["reason"] for event in events(raw, job, "departed")) == ["left", "left"]


def test_an_elastic_job_goes_on_without_one(launch: Launch) -> None:
    """--min 1: rank 1 dies for good, rank 0 forms a run of one and finishes; status 0, and the loss is told."""
    launcher = launch("-n", "2", "--min", "1", DTR_SETTLE_S="0.3")
    launcher.wait_for("formed", count=2)
    os.kill(launcher.wait_for("formed", rank=1)["pid"], signal.SIGKILL)
    eventually(lambda: launcher.said(0)[-1].get("world_size") == 1, what="a run of one")
    launcher.stop_trainers()
    assert launcher.wait() == 0
    assert "the others go on without it" in launcher.err


def test_signals_reach_the_whole_process_group(launch: Launch, tmp_path: Path) -> None:
    """SIGUSR1 and SIGUSR2 arrive at trainer and children; SIGTERM lets them end as they like, and the status is theirs."""
    script = (
        f'f={tmp_path}/got-$RANK-$1; for s in USR1 USR2; do trap "echo $s >>$f" $s; done; trap "echo TERM >>$f; exit 0" TERM; touch $f; '
        'if [ $1 = top ]; then bash -c "$2" x sub "$2" & fi; while :; do sleep 0.05; done'
    )
    launcher = launch("-n", "2", "--", "bash", "-c", script, "x", "top", script)
    files = [tmp_path / f"got-{rank}-{level}" for rank in range(2) for level in ("top", "sub")]
    eventually(lambda: all(file.exists() for file in files), what="all four processes")
    for number, expected in ((signal.SIGUSR1, "USR1\n"), (signal.SIGUSR2, "USR1\nUSR2\n")):
        launcher.signal(number)
        eventually(lambda wanted=expected: all(file.read_text() == wanted for file in files), what=expected)
    launcher.signal(signal.SIGTERM)
    assert launcher.wait() == 0
    eventually(lambda: all(file.read_text() == "USR1\nUSR2\nTERM\n" for file in files), what="the last words of the trainers' children")
    eventually(lambda: launcher.left() == [], what="the end of the trainers' children")


def test_ctrl_c_is_130_and_a_second_one_kills(launch: Launch) -> None:
    """One that ignores SIGINT is killed at the second; the status is 130 in any case; nothing is left."""
    launcher = launch("-n", "2", "--", "bash", "-c", 'trap "" INT; echo ready; while :; do sleep 0.05; done')
    eventually(lambda: launcher.out.count("ready") == 2, what="two trainers")
    launcher.signal(signal.SIGINT)
    eventually(lambda: "stopping the trainers" in launcher.err, what="the first Ctrl-C")
    while "killing what is left" not in launcher.err:  # an echo of the first press within 0.3 s does not count
        launcher.signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.process.wait(0.2)
    assert launcher.wait() == 130
    assert launcher.left() == []


def test_the_grace_ends_with_sigkill(launch: Launch) -> None:
    """SIGTERM is ignored: after --grace the trainer is killed; the status is that of the signal that the launcher got."""
    launcher = launch("--grace", "0.5", "--", "bash", "-c", 'trap "" TERM; echo ready; while :; do sleep 0.05; done')
    eventually(lambda: "ready" in launcher.out, what="the trainer")
    launcher.signal(signal.SIGTERM)
    assert launcher.wait() == 143
    assert "0.5 s have passed" in launcher.err


def test_nothing_is_left_behind(launch: Launch, tmp_path: Path) -> None:
    """What a trainer started in the background ends with it, even if it ignores SIGTERM; sockets, pages and locks are gone."""
    script = "bash -c \"trap '' TERM; while :; do sleep 0.1; done\" & echo $!"
    launcher = launch("-n", "2", "--", "bash", "-c", script)
    assert launcher.wait() == 0
    assert len(launcher.out.splitlines()) == 2
    assert launcher.left() == []
    assert [p.name for p in (tmp_path / "staging").rglob("*") if not p.is_dir()] == [".host-id"]


def test_a_trainer_behind_a_shell_is_looked_after(launch: Launch, raw: redis.Redis, job: str) -> None:
    """The shell is the launcher's child, the trainer the shell's: its death is told to Redis although the shell lives on."""
    script = f'{sys.executable} -m tests.launched "$DTR_TEST_FOLDER" || sleep 60'
    launcher = launch("--", "bash", "-c", script, DTR_TTL_S="300")
    os.kill(launcher.wait_for("formed")["pid"], signal.SIGKILL)
    found = eventually(lambda: events(raw, job, "departed"), what="the departure")
    assert "its parent" in found[0]["reason"]
    assert launcher.process.poll() is None


# --- what a launch stands on ----------------------------------------------------------------------------------------


def test_a_server_is_started_only_where_none_was_named(tmp_path: Path) -> None:
    """Default URL and nothing there: a server for the time of the block. The same URL named: an error. Both leave nothing running."""
    url = f"redis://127.0.0.1:{free_port()}/0"
    settings = Settings.load(environ={}, redis_url=url, staging=str(tmp_path / "staging"))
    with pytest.raises(CoordinatorUnavailable, match="it was named by DTR_REDIS_URL"):
        standing(settings, tmp_path / "home", must_answer="it was named by DTR_REDIS_URL", uploader=False).__enter__()
    with standing(settings, tmp_path / "home", must_answer="", uploader=False) as ground:
        assert redis.Redis.from_url(url).ping()
        assert not ground.uploads
        with standing(settings, tmp_path / "home", must_answer="", uploader=False):
            pass
        assert redis.Redis.from_url(url).ping(), "the second launch took the first one's server with it"
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(url).ping()


def test_a_server_that_refuses_is_not_replaced_and_one_without_info_is_used(tmp_path: Path) -> None:
    """A wrong password is refused without showing it; a user that may not call INFO, as in a strict ACL, is no obstacle."""
    user = ["--user", "agent", "on", ">right", "~*", "&*", "+@all", "-info"]
    with valkey_server(tmp_path / "server", args=user) as guarded:

        def ground(password: str) -> None:
            url = f"redis://agent:{password}@127.0.0.1:{guarded.port}/0"
            settings = Settings.load(environ={}, redis_url=url, staging=str(tmp_path / "staging"))
            with standing(settings, tmp_path / "home", must_answer="", uploader=False):
                pass

        ground("right")
        with pytest.raises(CoordinatorRefused) as caught:
            ground("wrong")
        assert "wrong" not in caught.value.message.replace("WRONGPASS", "")
    assert not (tmp_path / "home").exists()


SAVES_AND_ENDS = """
import sys
from worker_agent import Agent
with Agent.from_env(store=sys.argv[1]) as agent:
    agent.restore(fresh=True)
    agent.step()
    agent.save_async(b"state" * 100_000, replicated=True)
"""


def test_an_uploader_is_started_where_there_is_none_and_finishes(valkey: RedisServer, job: str, tmp_path: Path) -> None:
    """The server is there, an uploader is not: one runs for the time of the run. The trainer saves and ends at once; the launcher ends
    when the save is committed; staging memory is given back, and no process is left."""
    env = {"DTR_REDIS_URL": valkey.url, "DTR_JOB": job, "DTR_STAGING": str(tmp_path / "staging"), "DTR_HOME": str(tmp_path / "home")}
    with Launcher(tmp_path / "launch", "--", sys.executable, "-c", SAVES_AND_ENDS, str(tmp_path / "store"), env=env) as launcher:
        assert launcher.wait(120) == 0, launcher.err
        assert launcher.left() == []
    assert "this host has no uploader" in launcher.err
    assert "started uploader" in launcher.err
    assert [p.name for p in (tmp_path / "store").rglob("manifest.json")] == ["manifest.json"]
    assert [p.name for p in (tmp_path / "staging").rglob("*") if p.is_file()] == [".host-id"]


def test_staged_saves_are_waited_for_within_a_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Until the parts that were staged are final; not longer than the bound, and then it is told how many are left, and where."""
    staging = str(tmp_path / "staging")
    assert finish_uploads(staging, within_s=60) == 0
    arena = Arena(staging, job="job", worker="w0", policy="fail")
    for step in range(2):
        stage(arena, b"data", record(step))
    assert finish_uploads(staging, within_s=0.3) == 2
    assert f"2 staged parts are not committed; they stay in {staging}" in caplog.text
    uploader = threading.Timer(0.5, lambda: [finish(found, "committed") for found in staged(staging)])
    uploader.start()
    assert finish_uploads(staging, within_s=60) == 0
    uploader.join()
    arena.close()
