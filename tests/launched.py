"""A trainer for tests of the launcher, and the launcher as a process: ``python -m tests.launched FOLDER`` under ``worker_agent run``.

The trainer forms runs and steps until FOLDER/stop is there, holds the GIL in C code for as many seconds as FOLDER/hold-gil says, and
tells what happens as one JSON object a line in FOLDER/WORKER.RESTARTS.jsonl.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from tests.servers import RedisServer
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parent.parent
MARK = "DTR_TEST_MARK"
SHORT_TIMES = {"DTR_TTL_S": "1.5", "DTR_BEAT_INTERVAL_S": "0.3", "DTR_SETTLE_S": "0.3"}


def main(argv: list[str]) -> int:
    from dtr.errors import BarrierBroken, RosterChanged, StaleIncarnation
    from worker_agent import Agent

    folder = Path(argv[0])
    worker, restarts = os.environ["DTR_WORKER_ID"], os.environ["DTR_RESTARTS"]
    with (folder / f"{worker}.{restarts}.jsonl").open("a") as file:

        def say(event: str, **facts: Any) -> None:
            file.write(json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic(), **facts}) + "\n")
            file.flush()

        say("started")
        try:
            with Agent.from_env() as agent:
                while not (folder / "stop").exists():
                    try:
                        say(
                            "formed",
                            run=agent.run,
                            rank=agent.rank,
                            world_size=agent.world_size,
                            incarnation=agent.session.identity.incarnation,
                        )
                        while not (folder / "stop").exists():
                            agent.step()
                            time.sleep(0.05)
                            hold_gil(folder, say)
                            with agent.phase("waiting for the others"):
                                agent.barrier("step")
                    except (BarrierBroken, RosterChanged) as change:
                        say("changed", reason=change.message)
                        if not (folder / "stop").exists():
                            agent.form()
        except StaleIncarnation as stale:
            say("stale", reason=stale.message)
            return 3
        say("done")
    return 0


def hold_gil(folder: Path, say: Callable[..., None]) -> None:
    """Nothing of Python runs in this process meanwhile, as with C code that does not release the GIL."""
    order = folder / f"hold-gil-{os.environ['LOCAL_RANK']}"
    if order.exists():
        seconds = float(order.read_text())
        say("holding")
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        order.unlink()
        say("held")


class Launcher:
    """A launcher process, seen from a test. Whatever bears its mark is killed in the end.

    Args:
        folder: for its output and what its trainers tell.
        options: of ``run``, with the command; the command is this module's trainer if there is no ``--``.
        env: what differs from this process's environment.
        stderr: of the launcher; default: a file in ``folder``.
    """

    def __init__(self, folder: Path, *options: str, env: dict[str, str], stderr: int | None = None) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.mark = secrets.token_hex(8)
        command = [] if "--" in options else ["--", sys.executable, "-m", "tests.launched", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: self.mark, "DTR_TEST_FOLDER": str(folder), **env}
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker_agent", "run", *options, *command],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err if stderr is None else stderr,
            )  # fmt: skip

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(errors="replace")

    def said(self, rank: int | str = "*", restarts: int | str = "*") -> list[dict[str, Any]]:
        """What the trainers told, in the order of time; ``rank`` is the local one."""
        lines: list[dict[str, Any]] = []
        for path in self.folder.glob(f"*-{rank}.{restarts}.jsonl"):
            worker = path.name.removesuffix(".jsonl").rpartition(".")[0]
            text = path.read_text()
            lines += [{**json.loads(line), "worker": worker} for line in text[: text.rfind("\n") + 1].splitlines()]
        return sorted(lines, key=lambda line: line["at"])

    def wait_for(
        self, event: str, *, count: int = 1, rank: int | str = "*", restarts: int | str = "*", timeout_s: float = 60
    ) -> dict[str, Any]:
        """The newest of ``count`` such events."""

        def found() -> list[dict[str, Any]]:
            lines = [line for line in self.said(rank, restarts) if line["event"] == event]
            assert len(lines) >= count or self.process.poll() is None, f"the launcher ended: {self.err}"
            return lines if len(lines) >= count else []

        return eventually(found, timeout_s=timeout_s, what=f"{count} x {event!r} from {rank}")[-1]

    def stop_trainers(self) -> None:
        """Have the trainers end by themselves."""
        (self.folder / "stop").touch()

    def wait(self, timeout_s: float = 60) -> int:
        """Its exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the launcher does not end; it said: {self.err}") from None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def left(self) -> list[int]:
        """The processes that bear its mark: everything that it started, however far down."""
        return [pid for pid in _marked(self.mark) if pid != self.process.pid]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in [self.process.pid, *self.left()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)


@contextlib.contextmanager
def launching(server: RedisServer, job: str, folder: Path, **settings: str) -> Iterator[Callable[..., Launcher]]:
    """A function that starts launchers of one job without an uploader; all are ended with the block, whatever happens."""
    env = {"DTR_REDIS_URL": server.url, "DTR_JOB": job, "DTR_STAGING": str(folder / "staging"), "DTR_BARRIER_TIMEOUT_S": "60", **settings}
    with contextlib.ExitStack() as running:
        count = itertools.count()

        def launch(*options: str, stderr: int | None = None, **more: str) -> Launcher:
            launcher = Launcher(folder / f"launch-{next(count)}", "--no-uploader", *options, env={**env, **more}, stderr=stderr)
            return running.enter_context(launcher)

        yield launch


def _marked(mark: str) -> Sequence[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
