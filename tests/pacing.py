"""A trainer that consumes a data set at a pace of its own, without a collective.

    python -m tests.pacing URL JOB STAGING WORKER WORLD MS_PER_BATCH

Epoch after epoch until the run ends; of the run after that, one epoch. Prints which shards it consumed in that epoch as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    from dtr.errors import RosterChanged
    from worker_agent import Agent

    url, job, staging, worker, world, pace_ms = argv
    low = int(world) - 1
    with Agent(
        worker, url, (low, int(world)), job=job, staging=staging, ttl_s=1.5, beat_interval_s=0.2, settle_s=0.5, form_timeout_s=60
    ) as agent:
        try:
            consume(agent, int(pace_ms) / 1000, None)
        except RosterChanged:
            agent.form()
        shards = consume(agent, int(pace_ms) / 1000, 1)
        print(json.dumps({"worker": worker, "shards": sorted(shards)}), flush=True)
        agent.barrier("done")  # whoever leaves before ends the run for the others
    return 0


def consume(agent: object, pace_s: float, epochs: int | None) -> set[int]:
    """Consume; returns the shards."""
    shards: set[int] = set()
    for batch in agent.loader("numbers", batch_size=20, epochs=epochs, prefetch=1):  # type: ignore[attr-defined]
        if len(batch):
            time.sleep(pace_s)
            shards |= {shard for shard, _, _ in batch.ranges}
        agent.step(batch)  # type: ignore[attr-defined]
    return shards


def start(url: str, job: str, staging: Path, worker: str, *, world: int, pace_ms: int, data_weights: str) -> subprocess.Popen[str]:
    """One such trainer."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pacing", url, job, str(staging), worker, str(world), str(pace_ms)],
        cwd=ROOT, env={**os.environ, "DTR_DATA_WEIGHTS": data_weights}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
