"""What surrounds the demo's story: options, signals, folders, advice, and what is shown."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dtr.checkpoint.staging.arena import Arena
from dtr.checkpoint.staging.slots import FALLBACK
from dtr.config import Settings
from dtr.errors import ConfigError, InvalidInput, Unavailable
from dtr.host import host_id
from tests.staged import record, stage
from tests.waiting import eventually
from worker_agent.demo.__main__ import main, needs, parser, settings_of
from worker_agent.demo.advice import advice, command_of
from worker_agent.demo.checks import Check
from worker_agent.demo.director import Outcome, TrainersFailed
from worker_agent.demo.figures import measure
from worker_agent.demo.interrupts import Interrupts
from worker_agent.demo.options import BATCH, Options
from worker_agent.demo.proof import prove
from worker_agent.demo.report import LiveReport, Now, PlainReport, conclude
from worker_agent.demo.story import Story
from worker_agent.demo.workplace import SHARED_MEMORY, Workplace, clean_environment, memory_base


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"workers": 0}, "workers"),
        ({"workers": 17}, "workers"),
        ({"workers": 1}, "workers"),
        ({"steps": 0}, "steps"),
        ({"steps": 7}, "steps"),
        ({"steps": 1, "workers": 1, "kill": False}, "steps must be at least 2"),
        ({"hidden": 0}, "hidden"),
        ({"rejoin_after_s": -1.0}, "rejoin-after"),
        ({"rejoin_after_s": float("nan")}, "rejoin-after"),
    ],
)
def test_options_that_cannot_be_are_refused(given, field):
    """The message names the option."""
    with pytest.raises(InvalidInput, match=field):
        Options(**given)


def test_one_trainer_is_fine_where_nobody_is_killed():
    """So are few steps."""
    assert Options(workers=1, steps=2, kill=False).save_every == 1


@pytest.mark.parametrize(
    ("store", "told"),
    [("", "got ''"), (" ", "got ' '"), ("s3://", "s3://BUCKET/PREFIX"), ("ftp://host/x", "'ftp'"), (__file__, "which is a file")],
)
def test_what_is_no_store_is_refused_in_the_words_of_whoever_gave_it(store, told):
    """Before anything is made, and without the place in it that nobody typed: the exit status is that of every command of dtr."""
    with pytest.raises(ConfigError, match=told) as caught:
        Options(store=store)
    assert "demo-" not in caught.value.message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("steps", [8, 30, 60, 400, 1001])
def test_the_kill_comes_after_the_first_save_and_well_before_the_end(steps):
    """There has to be something to restore, and time for the replacement."""
    options = Options(steps=steps)
    assert options.save_every <= options.kill_at < steps * 3 // 4


@pytest.mark.parametrize(
    ("options", "samples"), [({}, 61_440), ({"workers": 16}, 245_760), ({"steps": 100_000}, 352_941), ({"steps": 2, "workers": 1}, 76)]
)
def test_the_data_is_so_small_that_epochs_end(options, samples):
    """Two epochs end within the steps, unless the library has too few samples for it."""
    asked = Options(kill=False, **options)
    assert asked.samples(17) == samples
    assert asked.samples(17) * 2 <= asked.steps * asked.workers * BATCH


def test_a_given_store_gets_a_folder_of_its_own_for_each_demo(tmp_path, monkeypatch):
    """No older job is found in it; a query stays a query, and a folder that is called like one a folder; default: the demo's own folder."""
    assert Options(store="s3://bucket/p?endpoint=http://h:1").store_in("/own", "demo-7") == "s3://bucket/p/demo-7?endpoint=http://h:1"
    assert Options(store=str(tmp_path)).store_in("/own", "demo-7") == f"file://{tmp_path}/demo-7"
    assert Options(store=f"{tmp_path}/a?b").store_in("/own", "demo-7") == f"file://{tmp_path}/a%3Fb/demo-7"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Options(store="~/mine").store_in("/own", "demo-7") == f"file://{tmp_path}/mine/demo-7"
    assert Options().store_in("/own", "demo-7") == "file:///own"


def test_defaults_of_the_command_line_are_those_of_the_options():
    """The parser adds nothing of its own."""
    assert Options(**vars(parser().parse_args([]))) == Options()


def test_nothing_of_the_users_dtr_gets_in():
    """Settings, a launcher's variables and dtr.toml stay outside; other variables pass."""
    env = clean_environment(
        {"DTR_STORE": "s3://mine", "DTR_TTL_S": "3", "RANK": "1", "WORLD_SIZE": "2", "PATH": "/bin", "PYTHONPATH": "/p"},
        import_from=Path("/src"),
        installed=frozenset({Path("/site")}),
    )
    assert {name: value for name, value in env.items() if not name.endswith("THREADS")} == {"PATH": "/bin", "PYTHONPATH": "/src:/p"}
    assert env["OMP_NUM_THREADS"] == "1"
    assert "PYTHONPATH" not in clean_environment({}, import_from=Path("/site"), installed=frozenset({Path("/site")}))


def test_what_is_started_gets_exactly_the_demos_settings(tmp_path, monkeypatch):
    """Whoever reads the environment of the demo's processes finds the director's settings again."""
    monkeypatch.setenv("DTR_STORE", "s3://mine")
    place = Workplace(folder=tmp_path, memory=tmp_path / "memory")
    settings = settings_of(place, Options(), port=7001, stamp="x")
    assert settings.store == f"file://{place.store}"
    assert Settings.load(environ=place.environment({}, settings), config_file=os.devnull) == settings


@pytest.mark.parametrize(("free", "expected"), [(None, Path("/tmp/x")), (99, Path("/tmp/x")), (100, SHARED_MEMORY)])
def test_small_shared_memory_is_left_alone(free, expected):
    """Docker gives 64 MB: then everything goes to disk."""
    assert memory_base(100, free, Path("/tmp/x")) == expected


def test_a_demo_says_how_much_room_it_needs():
    """Gradients of all ranks, slots of two of them, and every save on disk."""
    memory, disk = needs(Options())
    assert 150e6 < memory < 400e6
    assert 300e6 < disk < 1000e6


def test_workplace_knows_its_processes_and_leaves_nothing(tmp_path, monkeypatch):
    """A process is the demo's by its environment or by its folder; clearing ends both, and removes both folders."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    place = Workplace.create(memory_bytes=1, disk_bytes=1)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    children = [
        subprocess.Popen(sleep, env={"DTR_HOME": str(place.home)}),
        subprocess.Popen(sleep, env={}, cwd=place.home),
        subprocess.Popen(sleep, env={"DTR_HOME": str(place.home) + "x"}),
    ]
    try:
        eventually(lambda: {process.pid for process in place.running()} == {children[0].pid, children[1].pid}, what="both are seen")
        place.clear(keep=False)
        assert [child.wait(30) for child in children[:2]] == [-signal.SIGKILL] * 2
        assert children[2].poll() is None
        assert not place.folder.exists()
        assert not place.memory.exists()
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_whatever_stays_in_memory_is_seen_slots_above_all(tmp_path, monkeypatch):
    """Only the host's name and the word of where slots went instead may stay; a slot counts there too, and clearing gives it back."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place, disk = Workplace.create(memory_bytes=1, disk_bytes=1), tmp_path / "disk"
    try:
        assert host_id(str(place.staging))
        (place.staging / ".launchers").mkdir()
        (place.staging / FALLBACK).write_text(f"{disk}\n")
        assert place.remains() == []
        (place.staging / ".launchers" / "demo.0.lock").touch()
        (place.gradients / "gradients-1").touch()
        slot = [f"demo/w0/{name}" for name in ("owner.lock", "slot-0.json", "slot-0.lock", "slot-0.safetensors")]
        with contextlib.ExitStack() as trainers:
            for folder in (place.staging, disk):
                arena = trainers.enter_context(contextlib.closing(Arena(str(folder), job="demo", worker="w0")))
                stage(arena, b"left", record(job="demo"))
        assert place.remains() == [
            *(f"{disk}/{name}" for name in slot),
            "gradients/gradients-1",
            "staging/.launchers/demo.0.lock",
            *(f"staging/{name}" for name in slot),
        ]
    finally:
        place.clear(keep=True)
    assert not place.memory.exists()
    assert not disk.exists()


def test_what_a_killed_demo_left_is_removed_by_the_next_one(tmp_path, monkeypatch):
    """Both its folders go; a living demo's stay, and so do kept ones and what only looks like a demo's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make = "from worker_agent.demo.workplace import Workplace; p = Workplace.create(memory_bytes=1, disk_bytes=1); print(p.memory)"
    killed = subprocess.run(
        [sys.executable, "-c", make], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    kept = Workplace.create(memory_bytes=1, disk_bytes=1)
    kept.clear(keep=True)
    assert not left.exists()
    (tmp_path / "dtr-demo-mine").mkdir()
    living = Workplace.create(memory_bytes=1, disk_bytes=1)
    last = Workplace.create(memory_bytes=1, disk_bytes=1)
    assert {path.name for path in tmp_path.iterdir()} == {kept.folder.name, "dtr-demo-mine", living.folder.name, last.folder.name}
    assert living.memory.is_dir()
    for place in (living, last):
        place.clear(keep=False)
        assert not place.memory.exists()


def test_a_full_disk_is_said_before_anything_is_started(tmp_path, monkeypatch):
    """The message has both numbers, and nothing stays."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(Exception, match=r"needs about 1,000,000,000,000 MB in .*, and .* MB are free"):
        Workplace.create(memory_bytes=1, disk_bytes=10**18)
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import os, signal, sys
from worker_agent.demo.interrupts import Interrupts
interrupts = Interrupts()
interrupts.install()
def press():
    os.kill(os.getpid(), signal.{signal})
if {early}:
    press()
    print("not disturbed")
try:
    with interrupts.allowed():
        print("allowed")
        press()
        print("never said")
except KeyboardInterrupt:
    press()
    print("cleared up")
sys.exit(interrupts.status)
"""


@pytest.mark.parametrize(
    ("name", "early", "said", "status"),
    [
        ("SIGINT", False, ["allowed", "cleared up"], 130),
        ("SIGTERM", False, ["allowed", "cleared up"], 143),
        ("SIGINT", True, ["not disturbed", "cleared up"], 130),
    ],
)
def test_a_signal_interrupts_once_and_only_where_it_may(name, early, said, status):
    """Before it is allowed a signal waits; while clearing up another one does nothing."""
    program = INTERRUPTED.format(signal=name, early=early)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split("\n")[:-1], done.returncode, done.stderr) == (said, status, "")


def test_a_signal_held_back_until_installed_is_not_lost():
    """`dtr demo` blocks signals while the program loads: Ctrl-C then ends it as soon as it can clear up."""
    program = """
from worker_agent.demo.interrupts import Interrupts
interrupts = Interrupts()
interrupts.install()
print(interrupts.number)
"""
    blocked = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
os.kill(os.getpid(), signal.SIGINT)
os.execv(sys.executable, [sys.executable, "-c", {program!r}])
"""
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr


def test_advice_can_be_typed_as_it_stands(tmp_path):
    """dtr by name where it is on PATH, else by path; redis-cli where it is there, else dtr's own."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "dtr"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    python = str(tmp_path / "bin" / "python")
    assert command_of(python, str(tmp_path), which=lambda name: None) == "bin/dtr"
    assert command_of(python, "/elsewhere", which=lambda name: None) == str(tmp_path / "bin" / "dtr")
    assert command_of(python, "/elsewhere", which=lambda name: str(tmp_path / "bin" / name)) == "dtr"
    assert command_of("/nowhere/python", "/x", which=lambda name: None) == "/nowhere/python -m dtr"
    lines = advice("redis://127.0.0.1:7001/0", "demo", "http://127.0.0.1:5", executable=python, cwd=str(tmp_path), which=lambda name: None)
    assert "  bin/dtr redis-cli HGETALL 'dtr:{demo}:meta'" in lines
    assert "  export DTR_REDIS_URL=redis://127.0.0.1:7001/0" in lines
    with_client = advice("redis://127.0.0.1:7001/0", "demo", None, executable=python, cwd=str(tmp_path), which=lambda name: name)
    assert "  redis-cli -p 7001 HGETALL 'dtr:{demo}:meta'" in with_client
    assert not [line for line in with_client if "Flower" in line]


NOW = Now(
    step=41, steps=400, loss=2.5, step_s=0.05, doing={"0": "training", "1": "killed", "2": "training"}, saved=2, durable=1, stall_s=0.009,
    epoch=1, consumed=20_736, samples=61_440,
)  # fmt: skip
LONG = "barrier 'mean' round 17 of run 0001-abcd is broken: rank 2 (a-long-host-name-1234abcd-2) departed: signal 9 (SIGKILL)"


def test_without_a_terminal_there_are_plain_whole_lines():
    """No control codes, no wrapping, not even of a long line."""
    out = io.StringIO()
    report = PlainReport(Console(file=out, width=40))
    report.say(LONG, "bold red")
    report.show(NOW)
    report.close()
    assert re.fullmatch(r" +0\.\d s  " + re.escape(LONG) + "\n", out.getvalue())


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_on_a_terminal_no_line_is_wider_than_the_screen(width):
    """Lines are broken between words; the display keeps to the width too."""
    out = io.StringIO()
    report = LiveReport(Console(file=out, width=width, force_terminal=True, color_system=None))
    report.say(LONG)
    report.show(NOW)
    report.say("more")
    report.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", out.getvalue())
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= width
    assert "step 42 of" in plain
    assert width < 40 or "epoch 1, 33 % of 61,440 samples" in plain
    assert width < 80 or "trainers 0, 2 training; 1 killed" in plain
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1


def test_a_failed_check_stands_out_and_is_counted():
    """The last line says how many failed."""
    out = io.StringIO()
    report = PlainReport(Console(file=out))
    conclude(report, [("loss", "5 to 2")], [Check(ok=True, what="a", detail="b"), Check(ok=False, what="c", detail="d")])
    lines = [line.strip() for line in out.getvalue().splitlines() if line.strip()]
    assert lines == ["loss            5 to 2", "ok      a: b", "FAILED  c: d", "1 of 2 checks failed"]


@pytest.fixture
def without_a_process(monkeypatch, tmp_path):
    """The demo's main in this process: no signal is taken over, and the environment is a copy."""
    monkeypatch.setattr(Interrupts, "install", lambda self: None)
    monkeypatch.setattr("os.environ", os.environ.copy())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def outcome(*, ok: bool) -> Outcome:
    proof = prove([], {}, samples=1)
    return Outcome(
        figures=measure(Story(), [], proof, workers=4, seconds=1.0), checks=[Check(ok=ok, what="a", detail="b")], store="file:///s"
    )


@pytest.mark.usefixtures("without_a_process")
@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_the_exit_status_is_the_verdict(monkeypatch, capsys, tmp_path, ok, status):
    """A check that fails is exit status 1, and in the JSON too; nothing but JSON is on stdout; the folder stays to be looked at."""
    monkeypatch.setattr("worker_agent.demo.__main__.direct", lambda options, place, settings, report: outcome(ok=ok))
    assert main(["--json"]) == status
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["ok"], said["checks"]) == ("demo", ok, [{"what": "a", "ok": ok, "detail": "b"}])
    assert said["figures"]["recovery_s"] is None
    assert [path.name.startswith("dtr-demo-") for path in tmp_path.iterdir()] == ([] if ok else [True])


@pytest.mark.usefixtures("without_a_process")
def test_an_error_of_dtr_is_one_line_and_its_exit_status(monkeypatch, capsys):
    """The way of every command of dtr; where to look comes after it."""

    def fail(options, place, settings, report):
        raise Unavailable("no server program was found")

    monkeypatch.setattr("worker_agent.demo.__main__.direct", fail)
    assert main([]) == Unavailable.exit_code
    said = capsys.readouterr()
    assert said.err == "dtr demo: no server program was found\n"
    assert "kept: " in said.out


@pytest.mark.usefixtures("without_a_process")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], {"error": "the trainers failed; the end of the log: it hurts", "code": "TrainersFailed", "exit_code": 1}),
        (["--store="], {"code": "ConfigError", "exit_code": 3}),
        (["--workers=1"], {"code": "InvalidInput", "exit_code": 3}),
    ],
)
def test_an_error_is_an_object_on_stdout_where_json_was_asked_for(monkeypatch, capsys, arguments, error):
    """Early or late, as of every command of dtr; people get the lines of the message as they are."""

    def fail(options, place, settings, report):
        raise TrainersFailed("the trainers failed; the end of the log:\nit hurts")

    monkeypatch.setattr("worker_agent.demo.__main__.direct", fail)
    assert main(["--json", *arguments]) == error["exit_code"]
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found == {"error": found["error"], **error}
    assert found["error"] in " ".join(said.err.split())
