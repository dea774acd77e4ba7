"""From a SIGKILL under the launcher to the error of the last waiter: one of many is killed, again and again.

The launcher's own part is in it: it sees the exit and reports it. The victim notes the time just before it kills itself, each waiter
when its barrier raises; both read CLOCK_MONOTONIC of the one host. The launcher restarts the victim, and all form again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["deaths"]


def deaths(url: str, processes: int, count: int) -> list[float]:
    """Milliseconds from each death to the last of ``processes - 1`` errors, ``count`` of them."""
    with tempfile.TemporaryDirectory(prefix="dtr-bench-") as folder:
        base = urlsplit(url)._replace(path="/1").geturl()
        command = [
            sys.executable, "-m", "worker_agent", "run", "-n", str(processes), "--max-restarts", str(count), "--url", base,
            "--staging", f"{folder}/staging", "--job", "deaths", "--no-uploader",
            "--", sys.executable, "-m", "bench.barrier_deaths", folder, str(count),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the launcher ended with {done.returncode}: {done.stdout[-2000:]} {done.stderr[-2000:]}")
        killed: dict[int, float] = {}
        noticed: dict[int, list[float]] = {}
        for path in Path(folder).glob("*.jsonl"):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if entry["event"] == "kill":
                    killed[entry["round"]] = entry["at"]
                else:
                    noticed.setdefault(entry["round"], []).append(entry["at"])
        if len(killed) != count or any(len(noticed[n]) != processes - 1 for n in killed):
            raise RuntimeError(f"expected {count} deaths and {processes - 1} errors for each, got {len(killed)} and {noticed}")
        return [(max(noticed[n]) - at) * 1000 for n, at in sorted(killed.items())]


def trainer(folder: str, count: int) -> int:
    """What each process does: meet, and when its turn has come, die while the others wait."""
    from dtr.errors import BarrierBroken, RosterChanged
    from worker_agent import Agent

    with (
        Agent.from_env(job="deaths", barrier_timeout_s=300, form_timeout_s=300) as agent,
        (Path(folder) / f"{os.getpid()}.jsonl").open("w") as log,
    ):

        def note(event: str, number: int) -> None:
            log.write(json.dumps({"event": event, "round": number, "at": time.monotonic()}) + "\n")
            log.flush()

        while True:
            number = len(list(Path(folder).glob("death-*")))
            agent.barrier("agreed")  # so that all have counted the same deaths before the next
            if number >= count:
                return 0
            if agent.rank == agent.world_size - 1:
                _until_all_wait(agent)
                (Path(folder) / f"death-{number}").touch()
                note("kill", number)
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                agent.barrier("fatal")
            except (BarrierBroken, RosterChanged):
                note("error", number)
                agent.form()


def _until_all_wait(agent: object) -> None:
    session = agent.session  # type: ignore[attr-defined]
    arrived = session.state.keys.barrier("fatal", session.run.id, 0).arrived
    while session.state.redis.scard(arrived) < session.run.world_size - 1:
        time.sleep(0.05)
    time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(trainer(sys.argv[1], int(sys.argv[2])))
