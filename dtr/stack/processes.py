"""Processes of this machine that are told apart for sure, started in their own session and stopped in an orderly way.

Guarantees: a signal never reaches a process that merely got the number of one that ended (its start time and the machine's boot
are compared, under a pidfd); what was started ends when its starter ends; a stop ends the whole session that was started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dtr.clock import SYSTEM, Clock

__all__ = ["ProcessId", "alive", "identify", "send", "start", "stop", "stop_each"]

_TETHER: Final = str(Path(__file__).with_name("tether.py"))
_POLL_S: Final = 0.05
_KILL_S: Final = 10.0  # the kernel ends a killed process at once, unless it hangs in the kernel itself
_LOG_LIMIT_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """One process: its number, when it started (clock ticks since boot) and in which boot of the machine."""

    pid: int
    started_ticks: int
    boot: str

    def as_dict(self) -> dict[str, Any]:
        return {"pid": self.pid, "started_ticks": self.started_ticks, "boot": self.boot}


def identify(pid: int) -> ProcessId | None:
    """The process that has this number now; None if there is none, or only its corpse."""
    found = _stat(pid)
    if found is None or found.state in "ZX":
        return None
    return ProcessId(pid=pid, started_ticks=found.started_ticks, boot=_boot())


def alive(process: ProcessId) -> bool:
    """Whether exactly this process still runs; a zombie does not."""
    return identify(process.pid) == process


def send(process: ProcessId, number: signal.Signals) -> bool:
    """Send a signal to exactly this process; False if it has ended."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # Looked at after the handle was opened: if it is our process now, it was then, so the handle is its.
        if not alive(process):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def start(argv: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, without stdin, its output appended to ``log``; it ends with the calling thread.

    Args:
        argv: the command; its first word is the path of a program.
        log: a file; above 8 MiB it is moved to ``NAME.1`` first.
        cwd: its working folder.
        env: its environment; default: this process's.
    """
    if log.exists() and log.stat().st_size > _LOG_LIMIT_BYTES:
        log.replace(log.with_name(log.name + ".1"))
    command = [sys.executable, "-I", "-S", _TETHER, str(os.getpid()), *argv]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd, env=env, start_new_session=True)


def stop(processes: Sequence[ProcessId], *, grace_s: float) -> list[ProcessId]:
    """:func:`stop_each` with one grace for all."""
    return stop_each(dict.fromkeys(processes, grace_s))


def stop_each(
    graces_s: Mapping[ProcessId, float], *, hurried: Callable[[], bool] = lambda: False, clock: Clock = SYSTEM
) -> list[ProcessId]:
    """End these processes and what they started: SIGTERM to each, then, when its grace is over, SIGKILL to its session.

    Only the first process of a session gets the SIGTERM: Celery's children die of one, and their parent lets them finish.

    Args:
        graces_s: first processes of their sessions, as ``start`` makes them, each with the seconds until SIGKILL.
        hurried: asked while waiting; true ends every grace at once.
        clock: the time.

    Returns:
        Those that had to be killed.
    """
    for process in graces_s:
        send(process, signal.SIGTERM)
        send(process, signal.SIGCONT)  # a stopped process would not see SIGTERM
    began = clock.monotonic()
    killed: list[ProcessId] = []
    waiting = list(graces_s)
    while waiting:
        for process in waiting:
            over = clock.monotonic() - began >= graces_s[process] or hurried()
            if alive(process) and over and process not in killed:
                killed.append(process)
            if over or not alive(process):
                _end_session(process)
        waiting = [process for process in waiting if alive(process) and clock.monotonic() - began < graces_s[process] + _KILL_S]
        if waiting:
            clock.sleep(_POLL_S)
    return killed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stat:
    state: str
    session: int
    started_ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # what stands before it is the name, which may hold anything
    return _Stat(state=fields[0], session=int(fields[3]), started_ticks=int(fields[19]))


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _end_session(leader: ProcessId) -> None:
    """SIGKILL to the leader and to all that is left of its session."""
    send(leader, signal.SIGKILL)
    if leader.boot != _boot():
        return
    found = _stat(leader.pid)
    if found is not None and found.started_ticks != leader.started_ticks:
        return  # the number was given anew, which the kernel does only when the old session is empty
    for member in _session(leader.pid):
        if member.started_ticks >= leader.started_ticks:
            send(member, signal.SIGKILL)


def _session(session: int) -> Iterator[ProcessId]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (found := _stat(int(entry))) is not None and found.session == session and found.state not in "ZX":
            yield ProcessId(pid=int(entry), started_ticks=found.started_ticks, boot=_boot())
