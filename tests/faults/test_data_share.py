"""The data state of a checkpoint, though its trainer dies, sleeps or loses Redis between saying that it has a part and what it consumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from dtr.state.keys import Keys
from tests.servers import RedisServer
from tests.waiting import eventually
from tests.workers import celery, end

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 200
TRAINER = """
import os, sys
from worker_agent import Agent

with Agent.from_env() as agent:
    agent.datasets.register("d", path=sys.argv[2], format="jsonl", shard_size=20)
    found = agent.restore(fresh=True)
    seen = [] if found is None else found.state["seen"]
    if sys.argv[1] == "save":  # before the first batch, as a job that converts its state would
        os.environ["DTR_FAILPOINT"] = "save.after_begin=" + sys.argv[3]
        agent.save_async({"seen": seen}, step=agent.current_step + 1, replicated=True).durable.result(60)
        sys.exit()
    for number, batch in enumerate(agent.loader("d", batch_size=10, columns=["id"])):
        seen += [int(i) for i in batch["id"]]
        agent.step(batch)
        if sys.argv[1] == "begin" and number == 3:
            break
    agent.save_async({"seen": seen}, replicated=True).durable.result(60)
"""


@pytest.fixture
def uploader(own_valkey: RedisServer, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Starts one, when it is called."""
    started: list[subprocess.Popen[str]] = []
    yield lambda: started.append(celery("worker", url=own_valkey.url, staging=tmp_path / "staging", env={"DTR_SCAN_INTERVAL_S": "0.2"}))
    for child in started:
        end(child)


@pytest.mark.parametrize("fault", ["kill", "sleep:4", "kill, and Redis is emptied"])
def test_a_part_that_is_known_before_its_share(
    own_valkey: RedisServer, job: str, tmp_path: Path, uploader: Callable[[], None], fault: str
) -> None:
    """Given a part that Redis knows and a share that it does not, then what is committed has the share that lies in the slot."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("".join(json.dumps({"id": i}) + "\n" for i in range(SAMPLES)))
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "DTR_REDIS_URL": own_valkey.url, "DTR_JOB": job, "DTR_STAGING": str(tmp_path / "staging"),
        "DTR_STORE": str(tmp_path / "store"), "DTR_TESTING": "1", "DTR_TTL_S": "2", "DTR_BEAT_INTERVAL_S": "0.5", "DTR_WORKER_ID": "w0",
    }  # fmt: skip

    def train(*what: str) -> int:
        return subprocess.run([sys.executable, str(script), what[0], str(tmp_path / "data"), *what[1:]], env=env, timeout=120).returncode

    uploader()
    assert train("begin") == 0
    assert train("save", fault.partition(",")[0]) == (0 if fault.startswith("sleep") else -9)
    if "emptied" in fault:
        with redis.Redis.from_url(own_valkey.url) as client:
            client.flushall()
    eventually(lambda: len(manifests(tmp_path)) == 2, timeout_s=60, what="the second decision")
    assert train("go on") == 0
    decided = manifests(tmp_path)
    assert [found["decision"] for found in decided] == ["commit"] * 3
    assert all(found["data"].get("d") for found in decided), [found["data"] for found in decided]
    assert Counter(seen_of(own_valkey, job, tmp_path)) == Counter(range(SAMPLES))


def manifests(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "store").rglob("manifest.json"))]


def seen_of(server: RedisServer, job: str, folder: Path) -> list[int]:
    from dtr.checkpoint.manager import CheckpointManager

    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        assert client.hget(Keys(job).meta, "latest")
    with CheckpointManager(folder / "store", coordinator_url=server.url, job=job) as manager:
        found = manager.restore()
    assert found is not None
    return list(found.state["seen"])
