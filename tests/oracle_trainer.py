"""A trainer for the oracle: ``python -m tests.oracle_trainer FOLDER`` loads, steps, saves, and writes down what it consumed.

Its task and its data are in FOLDER; it appends to a log of its own there, in the words of `tests.oracle`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
import struct
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

STALE: Final = 3
FILES: Final = 5
COLUMNS: Final = {"jsonl": "id", "jsonl.gz": "id", "npy": "data", "bin": "tokens", "tar": "cls", "parquet": "id", "mds": "id"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the trainers do. ``batch`` is a rank's in dynamic mode, ``global_batch`` all ranks' in deterministic mode."""

    samples: int = 2_000
    epochs: int = 3
    shard_size: int = 50
    batch: int = 10
    global_batch: int = 20
    save_every: int = 5
    mode: str = "dynamic"
    form: str = "jsonl"
    step_s: float = 0.01


def main(argv: list[str]) -> int:
    from dtr.errors import BarrierBroken, RosterChanged, StaleIncarnation
    from worker_agent import Agent

    folder = Path(argv[0])
    task = Task(**json.loads((folder / "task.json").read_text()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (folder / f"log-{os.environ['DTR_WORKER_ID']}-{os.getpid()}.jsonl").open("w") as log:
        try:
            with Agent.from_env() as agent:
                while True:
                    try:
                        _register(agent, folder, task)  # again in each run: Redis may have been emptied
                        _train(agent, folder, task, log)
                        break
                    except (RosterChanged, BarrierBroken) as change:
                        print(f"{agent.worker_id}: {change}", flush=True)
                        agent.form()
                if agent.rank == 0:
                    _write_whole(folder / "lineage.json", json.dumps(agent.lineage()))
        except StaleIncarnation as stale:
            print(stale, flush=True)
            return STALE
    return 0


def _register(agent: Any, folder: Path, task: Task) -> None:
    more = {"dtype": "int64", "sample_length": 1} if task.form == "bin" else {}
    form = task.form.removesuffix(".gz")
    agent.datasets.register("d", path=folder / "data", format=form, shard_size=task.shard_size, shuffle=True, **more)


def _train(agent: Any, folder: Path, task: Task, log: Any) -> None:
    def note(**facts: Any) -> None:
        log.write(json.dumps({"run": agent.run, "rank": agent.rank, **facts}) + "\n")
        log.flush()

    found = agent.restore(fresh=True)
    state = {"seen": 0} if found is None else found.state
    note(restored=None if found is None else [found.run, found.step])
    size = {"batch_size": task.batch} if task.mode == "dynamic" else {"global_batch_size": task.global_batch}
    column, saved = COLUMNS[task.form], None
    for batch in agent.loader("d", epochs=task.epochs, columns=[column], mode=task.mode, **size):
        ids = [int(i) for i in batch[column].reshape(-1)]
        time.sleep(task.step_s)
        agent.barrier("gradients")
        step = agent.step(batch)
        state["seen"] += 1
        note(step=step, world_size=agent.world_size, seen=state["seen"], epoch=batch.epoch, batch=batch.number, ids=ids)
        _arm(agent.rank, step, saved)
        if step % task.save_every == 0:
            saved = agent.save_async(state, replicated=True)
    while (folder / "hold").exists():
        agent.session.check()
        time.sleep(0.05)
    agent.barrier("last")
    agent.save_async(state, replicated=True).durable.result(timeout=120)
    agent.barrier("end")


def _arm(rank: int, step: int, saved: Any) -> None:
    """DTR_TEST_FAULT=RANK:STEP:FAULT: this rank meets that failpoint from this step on; the save before is seen through."""
    fault = os.environ.get("DTR_TEST_FAULT", "")
    if fault and [str(rank), str(step)] == fault.split(":", 2)[:2]:
        if saved is not None:
            saved.durable.result(timeout=60)
        os.environ["DTR_FAILPOINT"] = fault.split(":", 2)[2]


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


# --- the data: the ids from 0 on, spread over files ---------------------------------------------------------------------


def write_data(folder: Path, task: Task) -> None:
    """The files of a task's data set."""
    folder.mkdir()
    for part in range(FILES):
        ids = list(range(part * task.samples // FILES, (part + 1) * task.samples // FILES))
        WRITERS[task.form](folder / f"{part}.{task.form}", ids)


def _jsonl(path: Path, ids: list[int]) -> None:
    text = "".join(json.dumps({"id": i}) + "\n" for i in ids).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def _npy(path: Path, ids: list[int]) -> None:
    import numpy as np

    np.save(path, np.array(ids, dtype=np.int64))


def _bin(path: Path, ids: list[int]) -> None:
    path.write_bytes(struct.pack(f"<{len(ids)}q", *ids))


def _tar(path: Path, ids: list[int]) -> None:
    with contextlib.closing(tarfile.open(path, "w")) as archive:
        for i in ids:
            member = tarfile.TarInfo(f"{i:06}.cls")
            member.size = len(content := str(i).encode())
            archive.addfile(member, io.BytesIO(content))


def _parquet(path: Path, ids: list[int]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"id": ids}), path, row_group_size=64)


def _mds(path: Path, ids: list[int]) -> None:
    config = json.dumps({"column_names": ["id"], "column_encodings": ["int"], "column_sizes": [8]}).encode()
    first = 4 + 4 * (len(ids) + 1) + len(config)
    begins = [first + 8 * n for n in range(len(ids) + 1)]
    path.write_bytes(struct.pack(f"<I{len(begins)}I", len(ids), *begins) + config + struct.pack(f"<{len(ids)}q", *ids))


WRITERS: Final[dict[str, Callable[[Path, list[int]], None]]] = {
    "jsonl": _jsonl, "jsonl.gz": _jsonl, "npy": _npy, "bin": _bin, "tar": _tar, "parquet": _parquet, "mds": _mds,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
