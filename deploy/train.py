"""A trainer for the compose file: all ranks fit one small model together, save as they go, and go on when one of them is lost.

    dtr run -n 4 --max-restarts 3 -- python train.py [STEPS]

Each rank computes its slice of a batch and, for brevity, the others' too; a real trainer exchanges gradients where the barrier is.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from dtr.errors import BarrierBroken, RosterChanged
from worker_agent import Agent

SAVE_EVERY = 20
TRUTH = np.linspace(-1.0, 1.0, 256)


def train(agent: Agent, steps: int) -> None:
    """Train up to ``steps`` from the newest checkpoint of the job, or from the beginning."""
    found = agent.restore(fresh=True)
    state: dict[str, Any] = {"weights": np.zeros(256), "seen": 0} if found is None else found.state
    for step in range(agent.current_step + 1, steps):
        batch = np.random.default_rng(step).normal(size=(64, 256))
        error = batch @ (state["weights"] - TRUTH)
        agent.barrier("gradients")
        state["weights"] -= 0.002 * batch.T @ error
        state["seen"] += len(batch)
        agent.step(step=step, loss=float(np.mean(error**2)))
        if step % SAVE_EVERY == 0:
            agent.save_async(state, replicated=True)
    agent.save_async(state, replicated=True).durable.result(timeout=120)
    print(f"rank {agent.rank}: done after {state['seen']} samples", flush=True)


def main(steps: int) -> int:
    """Train; after a change of the roster, form again and go on from the newest commit."""
    with Agent.from_env(job=os.environ.get("DTR_JOB", "compose")) as agent:
        while True:
            try:
                train(agent, steps)
                return 0
            except (RosterChanged, BarrierBroken) as change:
                print(f"rank {agent.rank}: {change}", flush=True)
                agent.form()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000))
