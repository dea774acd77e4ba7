"""The launcher's parts, each alone: command lines, environments, registrations, stalls, claims, what has to be started."""

from __future__ import annotations

import json
import os
import random
import selectors
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from dtr.cli.run import arguments, run
from dtr.config import LauncherEnvironment, Settings
from dtr.errors import ConfigError, InvalidInput
from dtr.membership import Identity
from dtr.progress import Progress
from worker_agent.__main__ import main, run_parser
from worker_agent.launcher import care
from worker_agent.launcher.claim import claimed
from worker_agent.launcher.ground import Facts, Need, decide
from worker_agent.launcher.plan import (
    CommandNotExecutable,
    CommandNotFound,
    Launch,
    Seat,
    check_descriptors,
    environment,
    find_command,
    seats,
)
from worker_agent.launcher.stall import StallRule, Watch, observe
from worker_agent.registration import LEAVE, Registration, parse_line

# --- command lines --------------------------------------------------------------------------------------------------


def test_dtr_run_has_the_options_of_the_launcher() -> None:
    """`dtr run` and `python -m worker_agent run` have the same options with the same defaults."""
    ours = {option for action in run_parser()._actions for option in action.option_strings}
    theirs = {option for parameter in run.params for option in parameter.opts if parameter.name != "command"}
    assert ours == theirs | {"-h", "--help"}
    assert {**run.make_context("run", ["x"]).params, "command": ["x"]} == vars(run_parser().parse_args(["x"]))


def test_what_dtr_run_parsed_the_launcher_parses_again() -> None:
    """Every option travels, options of the command stay its own, and values that begin with a dash survive."""
    given = [
        "-n",
        "3",
        "--min",
        "2",
        "--stall-action",
        "kill",
        "--url",
        "redis://h/0",
        "-q",
        "--job",
        "-x",
        "--",
        "python",
        "t.py",
        "-n",
        "9",
        "--",
        "--min",
    ]
    context = run.make_context("run", list(given))
    options = {k: v for k, v in context.params.items() if k != "command"}
    again = run_parser().parse_args([*arguments(options), "--", *context.params["command"]])
    assert (again.nproc, again.min, again.stall_action, again.url, again.job) == (3, 2, "kill", "redis://h/0", "-x")
    assert again.no_prefix
    assert not again.no_uploader
    assert again.command == ["--", "python", "t.py", "-n", "9", "--", "--min"]


@pytest.mark.parametrize(
    "argv",
    [
        [], ["fly"], ["run"], ["run", "--"], ["run", "-n", "0", "--", "x"], ["run", "-n", "1.5", "--", "x"],
        ["run", "--grace", "nan", "--", "x"], ["run", "--grace", "-1", "--", "x"], ["run", "--max-restarts", "-1", "--", "x"],
        ["run", "--stall-action", "shoot", "--", "x"],
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Usage errors end with 2 and say what was wrong, before anything is started."""
    try:
        status: Any = main(argv)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"nproc": 0}, "n"), ({"nproc": 5000}, "n"), ({"nnodes": 0}, "nnodes"), ({"minimum": 0}, "min"), ({"minimum": 5}, "min"),
        ({"stall_kills": True, "stall_timeout_s": 0.0}, "stall-timeout"),
    ],
)  # fmt: skip
def test_a_launch_that_cannot_be_is_refused(changes: dict[str, Any], field: str) -> None:
    """The error names the field."""
    with pytest.raises(InvalidInput) as caught:
        Launch(**{"command": ("x",), "nproc": 2, "nnodes": 2, **changes})
    assert caught.value.field == field


def test_the_command_is_looked_for_before_anything_is_started(tmp_path: Path) -> None:
    """127 if it does not exist, 126 if it is no program; found on the trainers' own PATH."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    with pytest.raises(CommandNotExecutable) as caught:
        find_command((str(program),), {})
    assert caught.value.exit_code == 126
    program.chmod(0o755)
    find_command((str(program),), {})
    find_command(("program",), {"PATH": str(tmp_path)})
    for missing in ("program", str(tmp_path / "no")):
        with pytest.raises(CommandNotFound) as lost:
            find_command((missing,), {"PATH": "/nowhere"})
        assert lost.value.exit_code == 127


def test_more_trainers_than_descriptors_are_refused() -> None:
    """With the numbers, before anything is started."""
    check_descriptors(Launch(command=("x",), nproc=4), 64)
    with pytest.raises(InvalidInput, match=r"8 trainers need 72 file descriptors of their launcher, and its limit is 64"):
        check_descriptors(Launch(command=("x",), nproc=8), 64)


# --- the environment of a trainer -----------------------------------------------------------------------------------


def place(launch: Launch, n: int = 1) -> Seat:
    return seats(launch, host="host-0a1b2c3d", index=0, folder="/run")[n]


def test_the_environment_of_one_host() -> None:
    """RANK is there, the agent reads back what was meant, and nothing of an outer launcher leaks in."""
    launch = Launch(command=("x",), nproc=4)
    outer = {"RANK": "7", "WORLD_SIZE": "9", "DTR_WORLD_MIN": "3", "DTR_LAUNCHER": "/outer", "HOME": "/home/me"}
    env = environment(launch, place(launch), settings=Settings(staging="/s"), job=None, restarts=2, environ=outer)
    read = LauncherEnvironment.load(env)
    assert (read.rank, read.world_size, read.local_rank, read.world_min, read.restarts) == (1, 4, 1, None, 2)
    assert (read.worker_id, read.socket) == ("host-0a1b2c3d-1", "/run/1.sock")
    assert (env["LOCAL_WORLD_SIZE"], env["DTR_STAGING"], env["HOME"]) == ("4", "/s", "/home/me")
    assert env["DTR_REDIS_URL"] == "redis://127.0.0.1:6379/0"
    assert "DTR_JOB" not in env
    assert outer["RANK"] == "7"


def test_the_environment_with_several_hosts() -> None:
    """RANK is not set, whatever the launcher inherited; WORLD_SIZE counts all hosts; --min and --job travel."""
    launch = Launch(command=("x",), nproc=4, nnodes=3, minimum=8)
    env = environment(launch, place(launch), settings=Settings(staging="/s"), job="team/j", restarts=0, environ={"RANK": "7"})
    read = LauncherEnvironment.load(env)
    assert (read.rank, read.world_size, read.local_rank, read.world_min) == (None, 12, 1, 8)
    assert env["DTR_JOB"] == "team/j"


def test_what_a_trainer_prints_through_a_pipe_is_not_kept_back() -> None:
    """Python's block buffering is off where output goes through the relay; the user's own choice wins."""

    def unbuffered(launch: Launch, **environ: str) -> str | None:
        return environment(launch, place(launch, 0), settings=Settings(staging="/s"), job=None, restarts=0, environ=environ).get(
            "PYTHONUNBUFFERED"
        )

    assert unbuffered(Launch(command=("x",), nproc=2)) == "1"
    assert unbuffered(Launch(command=("x",), nproc=2), PYTHONUNBUFFERED="") == ""
    assert unbuffered(Launch(command=("x",), nproc=2, prefix=False)) is None
    assert unbuffered(Launch(command=("x",), nproc=1)) is None


def test_a_host_id_that_leaves_no_room_is_refused() -> None:
    """The worker_id would be too long; the error says so before a trainer stumbles over it."""
    with pytest.raises(InvalidInput, match="worker_id"):
        seats(Launch(command=("x",), nproc=1), host="h" * 62, index=0, folder="/run")


# --- claims ---------------------------------------------------------------------------------------------------------


def test_launchers_at_once_differ_and_one_after_another_is_the_same(tmp_path: Path) -> None:
    """Index 0, then 1 beside it, then 0 again; another job counts on its own; nothing is left but the id of the host."""
    with claimed(str(tmp_path), "j") as first, claimed(str(tmp_path), "j") as second, claimed(str(tmp_path), "team/j") as other:
        assert (first.index, second.index, other.index) == (0, 1, 0)
        assert len({first.folder, second.folder, other.folder}) == 3
        assert os.stat(second.folder).st_mode & 0o777 == 0o700
    with claimed(str(tmp_path), "j") as again:
        assert (again.index, again.host) == (0, first.host)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [".host-id"]
    assert not os.path.exists(first.folder)


def test_a_claim_survives_what_a_killed_launcher_left(tmp_path: Path) -> None:
    """Its folder is emptied: a socket left there would be in the way."""
    left = tmp_path / ".launchers" / "j.0" / "0.sock"
    left.parent.mkdir(parents=True)
    left.touch()
    (tmp_path / ".launchers" / "j.0.lock").touch()
    with claimed(str(tmp_path), "j") as claim:
        assert os.listdir(claim.folder) == []


def test_a_long_staging_path_still_gets_sockets(tmp_path: Path) -> None:
    """The path of a Unix socket is short; the folder is then elsewhere, and removed as well."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    with claimed(str(deep), "j") as claim:
        assert len(claim.folder) < 90
        assert os.path.isdir(claim.folder)
    assert not os.path.exists(claim.folder)


def test_a_staging_folder_that_cannot_be_used_is_a_configuration_error(tmp_path: Path) -> None:
    """A file in its place: the error names the path."""
    (tmp_path / ".launchers").write_text("")
    with pytest.raises(ConfigError, match=r"\.launchers"), claimed(str(tmp_path), "j"):
        pass


# --- what has to be started -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "must_answer", "stack", "uploader", "wanted", "need"),
    [
        (False, True, False, False, True, Need.SERVER),
        (False, False, False, False, True, Need.STACK),
        (False, False, False, False, False, Need.STACK),
        (True, True, False, True, True, Need.NOTHING),
        (True, True, False, False, True, Need.UPLOADER),
        (True, True, False, False, False, Need.NOTHING),
        (True, False, True, True, True, Need.STACK),
        (True, True, True, False, True, Need.STACK),
    ],
)
def test_what_a_launch_needs(*, answers: bool, must_answer: bool, stack: bool, uploader: bool, wanted: bool, need: Need) -> None:
    """A server that must answer is never replaced; a local stack is held on to; an uploader is started only if wanted."""
    assert (
        decide(Facts(answers=answers, must_answer=must_answer, stack_is_up=stack, uploader_is_there=uploader, uploader_wanted=wanted))
        is need
    )


# --- stalls ---------------------------------------------------------------------------------------------------------


class Eyes:
    """Looks once a second from time 0 on."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self.rule = StallRule(timeout_s=timeout_s)
        self.watch: Watch | None = None
        self.now = 0.0

    def look(self, seconds: int, *, page_at: float = 0.0, phase: str = "training", stopped: bool = False) -> Watch:
        for _ in range(seconds):
            progress = Progress(step=1, phase=phase, at=page_at)
            self.watch = observe(self.watch, progress, self.now, stopped=stopped, rule=self.rule)
            self.now += 1
        assert self.watch is not None
        return self.watch


def test_no_progress_for_the_timeout_is_a_stall_until_there_is_progress() -> None:
    """Not before; and over at once with the next report."""
    eyes = Eyes()
    assert not eyes.look(11).stalled
    stalled = eyes.look(1)
    assert stalled.overdue
    assert "no progress for 10 s" in stalled.stalled
    assert eyes.look(1, page_at=12.0) == Watch(page_at=12.0, since=12.0, looked_at=12.0)


@pytest.mark.parametrize(
    ("phase", "stalls"), [("training loss 0.3", True), ("starting", True), ("evaluating", False), ("restoring", False)]
)
def test_an_announced_phase_may_take_its_time(phase: str, *, stalls: bool) -> None:
    """Only steps, and what comes before the first, are held against the clock."""
    assert bool(Eyes().look(1000, phase=phase).stalled) is stalls


def test_a_stopped_process_is_shown_at_once_and_overdue_later_in_any_phase() -> None:
    """SIGSTOP is a stall from the first look; killing still waits for the timeout."""
    eyes = Eyes()
    first = eyes.look(1, phase="evaluating", stopped=True)
    assert "stopped" in first.stalled
    assert not first.overdue
    assert eyes.look(12, phase="evaluating", stopped=True).overdue
    assert not Eyes(timeout_s=0).look(1000, stopped=True).overdue


def test_time_in_which_the_launcher_did_not_look_does_not_count() -> None:
    """The launcher was stopped for an hour together with its trainer: both get their time again."""
    eyes = Eyes()
    eyes.look(9)
    eyes.now += 3600
    assert not eyes.look(11).stalled
    assert eyes.look(1).stalled


def test_timeout_0_never_stalls() -> None:
    """0 turns it off."""
    assert not Eyes(timeout_s=0).look(1000).stalled


# --- registrations --------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "v": 1, "redis_url": "redis://:secret@127.0.0.1:6379/0", "job": "team/j", "worker_id": "w-0", "incarnation": "0123456789ab",
    "state_id": "0123456789abcdef", "host": "h", "pid": 7, "ttl_ms": 5000, "interval_ms": 1000, "number": 0, "page": "/p",
}  # fmt: skip


def test_a_registration_is_parsed_and_shows_no_secret() -> None:
    """Everything arrives; the URL, which may hold a password, is not in its repr; an unknown field of a later version is no error."""
    found = parse_line(json.dumps({**GOOD, "later": 1}).encode())
    assert isinstance(found, Registration)
    assert (found.job, found.who.worker_id, found.who.incarnation, found.number) == ("team/j", "w-0", "0123456789ab", 0)
    assert found.member == (GOOD["redis_url"], "team/j", "w-0")
    assert "secret" not in repr(found)
    assert parse_line(b'{"leave":true}') is LEAVE


BAD: list[tuple[str, Any]] = [
    ("v", 2), ("v", None), ("redis_url", "http://x"), ("redis_url", None), ("job", "a/b/c"), ("job", 3), ("worker_id", "../x"),
    ("worker_id", "a b"), ("worker_id", "x" * 64), ("incarnation", ""), ("state_id", None), ("host", 1), ("pid", 0), ("pid", "7"),
    ("pid", True), ("ttl_ms", 0), ("ttl_ms", 1.5), ("ttl_ms", 10**15), ("interval_ms", 0), ("interval_ms", 9999), ("number", -2),
    ("number", 2**60), ("page", "a\0b"), ("page", "x" * 5000),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD, ids=[f"{field}-{str(value)[:12]!r}" for field, value in BAD])
def test_a_wrong_field_is_named(field: str, value: Any) -> None:
    """Each field is checked, in type and range; so is its absence; no secret is repeated."""
    with pytest.raises(InvalidInput) as caught:
        parse_line(json.dumps({**GOOD, field: value}).encode())
    assert caught.value.field == field
    assert "secret" not in caught.value.message
    with pytest.raises(InvalidInput) as missing:
        parse_line(json.dumps({k: v for k, v in GOOD.items() if k != field}).encode())
    assert missing.value.field == field


def test_any_bytes_are_refused_and_nothing_else() -> None:
    """Random and hostile lines raise InvalidInput, never another error."""
    chance = random.Random(5)
    lines = [b"", b"null", b"[]", b"7", b'"x"', b"{", b"\xff\xfe", b"[" * 50_000, b'{"v":' + b"1" * 5000 + b"}"]
    lines += [bytes(chance.randrange(256) for _ in range(chance.randrange(60))) for _ in range(500)]
    for line in lines:
        with pytest.raises(InvalidInput):
            parse_line(line)


# --- whose step it was ----------------------------------------------------------------------------------------------


class Warded:
    """Stands for a ward: a registration and the step on its page."""

    def __init__(self, registration: Registration, **options: Any) -> None:
        self.registration, self.left, self.stall = registration, False, options["on_stall"]

    def start(self) -> None: ...

    def release(self) -> None: ...

    def progress(self) -> Progress:
        return Progress(step=STEPS[self.registration.job], phase="training", at=0.0)


STEPS = {"train": 100, "eval": 3}


def test_the_step_is_that_of_the_job_that_the_trainer_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that went on to another job is not said to be at a step of the first; with several, the job is named."""
    monkeypatch.setattr(care, "Ward", Warded)
    posted: list[Any] = []
    told: list[tuple[int, str]] = []
    inbox = SimpleNamespace(post=posted.append)
    found = care.Care(
        selectors.DefaultSelector(), inbox, rule=StallRule(timeout_s=1), pid_of=lambda seat: 1,  # type: ignore[arg-type]
        on_stall=lambda seat, watch, step, job: told.append((step, job)),
    )  # fmt: skip

    def registered(job: str) -> Any:
        visitor = Mock(seat=0, pid=1)
        who = Identity(state_id="s", worker_id="w", incarnation="0" * 12, host="h", pid=1)
        found.registered(visitor, Registration(redis_url="r", job=job, who=who, ttl_ms=1, interval_ms=1, number=0, page=""))  # type: ignore[arg-type]
        return visitor

    assert found.last_step(0) == (-1, "")
    train = registered("train")
    assert found.last_step(0) == (100, "")
    registered("eval")
    assert found.last_step(0) == (3, "eval")
    found._of[train].stall(None)
    posted.pop()()
    assert told == [(100, "train")], "a stall is of the job whose page stood still"
    found.left(train)
    assert found.last_step(0) == (3, "eval")
