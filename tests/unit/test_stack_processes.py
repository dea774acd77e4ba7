"""Processes are told apart, end with their starter, and are ended with all that they started."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dtr.stack import processes
from dtr.stack.processes import ProcessId
from tests.waiting import eventually

SLEEP = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('armed', flush=True); time.sleep(600)"
FAMILY = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
child = subprocess.Popen([sys.executable, "-c", "{STUBBORN}"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
signal.pause()
"""

PATIENT = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: None)
print("on", flush=True)
signal.pause()
while open("/proc/{other}/stat").read().rpartition(")")[2].split()[0] != "Z":
    time.sleep(0.01)
raise SystemExit(3)
"""


@pytest.fixture
def started(tmp_path: Path):
    """Starts Python code as a service would be; whatever is left is killed."""
    made: list[subprocess.Popen[bytes]] = []

    def start(code: str, log: str = "log") -> tuple[subprocess.Popen[bytes], ProcessId]:
        child = processes.start([sys.executable, "-c", code], log=tmp_path / log, cwd=tmp_path)
        made.append(child)
        found = processes.identify(child.pid)
        assert found is not None
        return child, found

    yield start
    for child in made:
        child.kill()
        child.wait()


def said(log: Path) -> str:
    return eventually(lambda: log.read_text().strip() if log.exists() else "", what=f"output in {log}")


def test_a_process_is_itself_and_a_zombie_is_not_alive(started):
    """One that ended counts as gone even while nobody has waited for it."""
    child, found = started(SLEEP)
    assert processes.alive(found)
    child.kill()
    eventually(lambda: not processes.alive(found), what="the end of the process")
    assert processes.identify(child.pid) is None
    assert Path(f"/proc/{child.pid}").exists(), "it should still be a zombie here, or this test shows nothing"


def test_a_number_given_anew_is_never_signalled(started):
    """The same number with another start time, or of another boot, is somebody else."""
    child, found = started(SLEEP)
    for stranger in (dataclasses.replace(found, started_ticks=found.started_ticks - 1), dataclasses.replace(found, boot="other")):
        assert not processes.alive(stranger)
        assert processes.send(stranger, signal.SIGKILL) is False
        assert processes.stop([stranger], grace_s=0) == []
    assert child.poll() is None


def test_stop_lets_a_process_end_by_itself(started, tmp_path):
    """SIGTERM comes first; nothing has to be killed."""
    child, found = started("import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('on', flush=True); signal.pause()")
    assert said(tmp_path / "log") == "on"
    assert processes.stop([found], grace_s=30) == []
    assert child.wait() == 7


def test_stop_kills_what_ignores_it(started, tmp_path):
    """After the grace there is SIGKILL, and the caller learns of it."""
    child, found = started(STUBBORN)
    assert said(tmp_path / "log") == "armed"
    assert processes.stop([found], grace_s=0.2) == [found]
    assert child.wait() == -signal.SIGKILL


def test_each_has_its_own_grace(started, tmp_path):
    """One that hangs is killed in its time, while another is still at its work; that one ends by itself."""
    hung, hanging = started(STUBBORN, "hanging")
    busy, working = started(PATIENT.format(other=hung.pid))
    assert (said(tmp_path / "hanging"), said(tmp_path / "log")) == ("armed", "on")
    assert processes.stop_each({hanging: 0.1, working: 60}) == [hanging]
    assert (hung.wait(), busy.wait()) == (-signal.SIGKILL, 3)


def test_stop_in_a_hurry_ends_the_grace(started, tmp_path):
    """A second Ctrl-C does not wait."""
    child, found = started(STUBBORN)
    assert said(tmp_path / "log") == "armed"
    assert processes.stop_each({found: 600}, hurried=lambda: True) == [found]
    assert child.wait() == -signal.SIGKILL


def test_stop_ends_the_whole_session(started, tmp_path):
    """A child that outlives its parent goes too, although it ignores SIGTERM."""
    _, found = started(FAMILY)
    grandchild = processes.identify(int(said(tmp_path / "log")))
    assert grandchild is not None
    assert processes.stop([found], grace_s=30) == []
    eventually(lambda: not processes.alive(grandchild), what="the end of the grandchild")


def test_a_stopped_process_is_ended_too(started):
    """SIGSTOP does not save it from an orderly end."""
    child, found = started(SLEEP)
    os.kill(child.pid, signal.SIGSTOP)
    assert processes.stop([found], grace_s=30) == []


def test_a_service_ends_with_its_starter(tmp_path):
    """The starter is killed without a chance to do anything, and the service goes with it."""
    code = f"""
import sys, time
from pathlib import Path
from dtr.stack import processes
child = processes.start([sys.executable, "-c", "{SLEEP}"], log=Path("log"), cwd=Path("."))
print(child.pid, flush=True)
time.sleep(600)
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path, env=env) as starter:
        assert starter.stdout is not None
        service = processes.identify(int(starter.stdout.readline()))
        assert service is not None
        eventually(lambda: b"sleep" in Path(f"/proc/{service.pid}/cmdline").read_bytes(), what="the service behind its tether")
        starter.kill()
    eventually(lambda: not processes.alive(service), what="the end of the service")


def test_a_command_that_does_not_exist_says_so(tmp_path):
    """The log names it, and the status is the shell's for a missing command."""
    child = processes.start(["/nowhere/redis-server"], log=tmp_path / "log", cwd=tmp_path)
    assert child.wait() == 127
    assert "/nowhere/redis-server cannot be started" in (tmp_path / "log").read_text()


def test_a_log_that_grew_long_is_moved_away(tmp_path):
    """One old generation is kept, so that logs are bounded."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(9 << 20)
    assert processes.start([sys.executable, "-c", "print('new')"], log=log, cwd=tmp_path).wait() == 0
    assert log.read_text() == "new\n"
    assert (tmp_path / "log.1").stat().st_size == 9 << 20
