"""One trainer as a process: started in a session of its own, watched through a pidfd, ended with all of its process group.

Guarantees: a signal never reaches a process that merely got the number of one that ended, because the corpse is kept until its
group is gone; what a trainer leaves running in its group ends with it (SIGTERM, then SIGKILL after a second).
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from worker_agent.launcher.outcome import Outcome
from worker_agent.launcher.procfs import living_group, oom_kills

__all__ = ["Child"]

REST_GRACE_S: Final = 1.0  # multiprocessing's resource tracker needs a moment to give shared memory back
UNKILLABLE_S: Final = 5.0  # what is still there then hangs in the kernel, or runs as another user


class Child:
    """A started process. All methods are for one thread, and none waits.

    Args:
        command: program and arguments.
        env: its environment.
        stdin, stdout, stderr: descriptors, or None for the launcher's own.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], *, stdin: int | None, stdout: int | None, stderr: int | None
    ) -> None:
        self._oom_kills = oom_kills()
        self._process = subprocess.Popen(list(command), env=dict(env), stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            self.pidfd = os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise
        self.stalled = False
        self.killed_because = ""
        self._asked_rest_at: float | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def outcome(self) -> Outcome | None:
        """How it ended, or None while it runs. Leaves the corpse, and with it the number, in place."""
        found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        if found.si_code == os.CLD_EXITED:
            return Outcome(code=found.si_status)
        return Outcome(signal=found.si_status, note=self._note(found.si_status))

    def _note(self, number: int) -> str:
        if self.killed_because:
            return self.killed_because
        if number == signal.SIGKILL and oom_kills() > self._oom_kills:
            return "the kernel's out-of-memory killer has struck on this machine meanwhile"
        return ""

    def send(self, number: int) -> None:
        """Send a signal to its process group. One that asks to stop also wakes what is stopped, so that it is heard."""
        self._each_group(number)
        if number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
            self._each_group(signal.SIGCONT)

    def kill(self, because: str) -> None:
        """SIGKILL its process group, for a reason that its outcome tells."""
        self.killed_because = because
        self._each_group(signal.SIGKILL)

    def _each_group(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # nobody is left, or what is left has become another user's

    def clear(self, now: float) -> bool:
        """After its end: see to it that its group ends as well. Call again until it answers True; then the process is gone."""
        if any(living_group(self.pid)):
            if self._asked_rest_at is None:
                self._asked_rest_at = now
                self.send(signal.SIGTERM)
            asked_s = now - self._asked_rest_at
            if asked_s >= REST_GRACE_S:
                self._each_group(signal.SIGKILL)
            if asked_s < REST_GRACE_S + UNKILLABLE_S:
                return False
        self._process.wait()
        self._bury_orphans()
        os.close(self.pidfd)
        return True

    def _bury_orphans(self) -> None:
        """Where the launcher is the first process of a container, what a trainer left behind has become its child."""
        try:
            while os.waitpid(-self.pid, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
