"""Trainers that load data while others die, and an oracle that shares no code with the loader: ``python -m tests.oracle FOLDER``.

Each trainer appends a line (run, step, rank, epoch, ids) to a log of its own after each step. In the end the runs of the surviving lineage,
each up to the step that was taken from it, must have consumed each epoch's samples exactly once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.waiting import eventually

ROOT = Path(__file__).resolve().parent.parent
STALE = 3
TTL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the trainers do."""

    samples: int = 2_000
    epochs: int = 3
    shard_size: int = 50
    batch: int = 10
    save_every: int = 5
    mode: str = "dynamic"
    form: str = "jsonl"
    step_s: float = 0.01


# --- the trainer ------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    from dtr.errors import RosterChanged, StaleIncarnation
    from worker_agent import Agent

    folder = Path(argv[0])
    task = Task(**json.loads((folder / "task.json").read_text()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (folder / f"log-{os.environ['DTR_WORKER_ID']}-{os.getpid()}.jsonl").open("w") as log:
        try:
            with Agent.from_env() as agent:
                _register(agent, folder, task)
                while True:
                    try:
                        _train(agent, task, log)
                        break
                    except RosterChanged as change:
                        print(f"{os.getpid()}: {change}", flush=True)
                        agent.form()
                if agent.rank == 0:
                    (folder / "lineage.json").write_text(json.dumps(agent.lineage()))
        except StaleIncarnation as stale:
            print(stale, flush=True)
            return STALE
    return 0


def _register(agent: Any, folder: Path, task: Task) -> None:
    more = {"dtype": "int64", "sample_length": 1} if task.form == "bin" else {}
    agent.datasets.register("d", path=folder / "data", format=task.form, shard_size=task.shard_size, shuffle=True, **more)


def _train(agent: Any, task: Task, log: Any) -> None:
    found = agent.restore(fresh=True)
    state = {"seen": 0} if found is None else found.state
    size = {"batch_size": task.batch} if task.mode == "dynamic" else {"global_batch_size": 2 * task.batch}
    column = {"jsonl": "id", "npy": "data", "bin": "tokens"}[task.form]
    handle = None
    for batch in agent.loader("d", epochs=task.epochs, columns=[column], mode=task.mode, **size):
        ids = [int(i) for i in batch[column].reshape(-1)]
        time.sleep(task.step_s)
        agent.barrier("gradients")
        step = agent.step(batch)
        log.write(json.dumps({"run": agent.run, "step": step, "rank": agent.rank, "epoch": batch.epoch, "ids": ids}) + "\n")
        log.flush()
        state["seen"] += 1
        _arm(agent.rank, step)
        if step % task.save_every == 0:
            handle = agent.save_async(state, replicated=True)
    del handle
    agent.barrier("last")
    agent.save_async(state, replicated=True).durable.result(timeout=60)
    agent.barrier("end")


def _arm(rank: int, step: int) -> None:
    """DTR_TEST_FAULT=RANK:STEP:FAULT: once, in the first run, this rank meets that failpoint from this step on."""
    fault = os.environ.get("DTR_TEST_FAULT", "")
    if fault and [str(rank), str(step)] == fault.split(":", 2)[:2]:
        os.environ["DTR_FAILPOINT"] = fault.split(":", 2)[2]


# --- the oracle -------------------------------------------------------------------------------------------------------------


def verdict(folder: Path, task: Task) -> dict[str, int]:
    """How many samples the surviving lineage lost or consumed twice, over all epochs."""
    last_of = dict(json.loads((folder / "lineage.json").read_text()))
    seen = [Counter[int]() for _ in range(task.epochs)]
    for path in folder.glob("log-*.jsonl"):
        text = path.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            entry = json.loads(line)
            if entry["run"] in last_of and entry["step"] <= last_of[entry["run"]]:
                seen[entry["epoch"]].update(entry["ids"])
    lost = sum(1 for counts in seen for i in range(task.samples) if not counts[i])
    twice = sum(1 for counts in seen for n in counts.values() if n > 1)
    return {"lost": lost, "twice": twice, "runs": len(last_of)}


# --- who makes the trouble --------------------------------------------------------------------------------------------------


@dataclass
class Trainers:
    """The processes of one job, without a launcher: each beats for itself."""

    folder: Path
    env: dict[str, str]
    task: Task
    low: int = 1
    high: int = 8
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "task.json").write_text(json.dumps(self.task.__dict__))
        _write(self.folder / "data", self.task)
        self.out = (self.folder / "out").open("ab")

    def start(self, worker: str, **more: str) -> None:
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), **self.env, **more, "DTR_WORKER_ID": worker, "DTR_STORE": str(self.folder / "store"),
            "WORLD_SIZE": str(self.high), "DTR_WORLD_MIN": str(self.low), "DTR_TTL_S": str(TTL_S), "DTR_BEAT_INTERVAL_S": "0.25",
            "DTR_SETTLE_S": "0.4",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.oracle", str(self.folder)]
        self.children[worker] = subprocess.Popen(command, cwd=ROOT, env=env, stdout=self.out, stderr=self.out)

    def signal(self, worker: str, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.children[worker].send_signal(number)

    def lines(self) -> int:
        """How much was logged so far, by all."""
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("log-*.jsonl"))

    def wait_for_progress(self, more: int, timeout_s: float = 90) -> bool:
        """Wait until so many more batches were logged; False if the job ended before."""
        goal = self.lines() + more
        return bool(eventually(lambda: "on" if self.lines() >= goal else "over" if self.over() else None, timeout_s=timeout_s) == "on")

    def over(self) -> bool:
        return any(child.poll() == 0 for child in self.children.values()) and (self.folder / "lineage.json").exists()

    def wait(self, timeout_s: float = 120) -> None:
        """Until all have ended; whoever was taken for dead or killed is started again unless the job is over."""

        def ended() -> bool:
            for worker, child in list(self.children.items()):
                if child.poll() not in (None, 0) and not self.over():
                    self.start(worker)
            return all(child.poll() is not None for child in self.children.values())

        eventually(ended, timeout_s=timeout_s, what="the end of the job")

    def close(self) -> None:
        for child in self.children.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGKILL)
            child.wait(30)
        self.out.close()


def disturb(trainers: Trainers, dice: random.Random) -> str:
    """One random event, and what is needed for the job to go on; returns what it was."""
    alive = sorted(worker for worker, child in trainers.children.items() if child.poll() is None)
    event = dice.choice(["kill", "kill", "stop", "add", "remove"])
    worker = dice.choice(alive)
    if event == "kill":
        trainers.signal(worker, signal.SIGKILL)
        trainers.children[worker].wait(30)
        trainers.start(worker)
    elif event == "stop":
        trainers.signal(worker, signal.SIGSTOP)
        time.sleep(3 * TTL_S)
        trainers.signal(worker, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            trainers.children[worker].wait(15)
            trainers.start(worker)
    elif event == "add" and len(alive) < trainers.high:
        worker = f"w-{dice.randrange(1 << 16):04x}"
        trainers.start(worker)
    elif event == "remove" and len(alive) > trainers.low + 1:
        trainers.signal(worker, signal.SIGTERM)
        trainers.children.pop(worker).wait(30)
    return f"{event} {worker}"


def _write(folder: Path, task: Task) -> None:
    import numpy as np

    folder.mkdir()
    files = 5
    for part in range(files):
        ids = np.arange(part * task.samples // files, (part + 1) * task.samples // files, dtype=np.int64)
        if task.form == "jsonl":
            (folder / f"{part}.jsonl").write_text("".join(json.dumps({"id": int(i)}) + "\n" for i in ids))
        elif task.form == "npy":
            np.save(folder / f"{part}.npy", ids)
        else:
            ids.tofile(folder / f"{part}.bin")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
