"""A whole job under the launcher: it saves, loses a trainer, restores and goes on; and again after Redis was lost altogether."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import RedisServer, valkey_server
from tests.trainer import ROOT

TRAINER = """
import json, os, signal, sys
from pathlib import Path
import numpy as np
from dtr.errors import BarrierBroken, RosterChanged
from worker_agent import Agent

work, steps, kill_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def train(agent, log):
    found = agent.restore(fresh=True)
    state = {"w": np.zeros(1000)} if found is None else found.state
    restored = found and found.step
    log.write(json.dumps({"run": agent.run, "restored": restored, "w": float(state["w"][0])}) + "\\n")
    while agent.current_step < steps - 1:
        agent.barrier("gradients")
        state["w"] += 1.0
        step = agent.step()
        if step % 3 == 2:
            handle = agent.save_async(state, replicated=True)
            if step == kill_at - 2:
                handle.durable.result(timeout=60)
        if step == kill_at and agent.rank == 1 and not (work / "killed").exists():
            (work / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    agent.save_async(state, replicated=True).durable.result(timeout=60)
    assert (state["w"] == steps).all(), (state["w"][:3], steps)

with Agent.from_env(job="whole", store=f"file://{work / 'store'}", form_timeout_s=60, barrier_timeout_s=60) as agent:
    with (work / f"log-{os.getpid()}").open("w") as log:
        while True:
            try:
                train(agent, log)
                break
            except (RosterChanged, BarrierBroken) as change:
                log.write(json.dumps({"change": str(change)}) + "\\n")
                agent.form()
        log.write(json.dumps({"lineage": agent.lineage()}) + "\\n")
"""


def run(server: RedisServer, work: Path, steps: int, kill_at: int = -1) -> list[dict[str, Any]]:
    """Three ranks under the launcher; what they logged."""
    script = work / "trainer.py"
    script.write_text(TRAINER)
    for old in work.glob("log-*"):
        old.unlink()
    done = subprocess.run(
        [
            sys.executable, "-m", "worker_agent", "run", "-n", "3", "--max-restarts", "1", "--url", server.url,
            "--staging", str(work / "staging"), "--", sys.executable, str(script), str(work), str(steps), str(kill_at),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    return [json.loads(line) for path in sorted(work.glob("log-*")) for line in path.read_text().splitlines()]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DTR_HOME", str(tmp_path / "home"))
    return tmp_path


def test_a_job_survives_a_killed_trainer_and_then_the_loss_of_redis(own_valkey: RedisServer, work: Path) -> None:
    """Every rank ends with the state that an undisturbed job has; a new Redis continues where the store's last commit is."""
    logged = run(own_valkey, work, steps=12, kill_at=7)
    restored = [entry["restored"] for entry in logged if "restored" in entry]
    assert sorted(r for r in restored if r is not None) == [5, 5, 5], "all three restored the newest commit"
    assert all(entry["w"] == (entry["restored"] + 1 if entry["restored"] is not None else 0) for entry in logged if "restored" in entry)
    assert any("rank 1" in entry["change"] and "signal 9" in entry["change"] for entry in logged if "change" in entry)
    (first, second) = next(entry["lineage"] for entry in logged if "lineage" in entry)
    assert first[1] == 5
    assert second[1] == 11

    with valkey_server(work / "another-valkey") as empty:
        logged = run(empty, work, steps=20)
    assert [entry["restored"] for entry in logged if "restored" in entry] == [11, 11, 11]
    lineage = next(entry["lineage"] for entry in logged if "lineage" in entry)
    assert [runs[0] for runs in lineage[:2]] == [first[0], second[0]]
    assert lineage[-1][1] == 19
