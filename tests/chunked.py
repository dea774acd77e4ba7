"""A job whose parts are stored as chunks: real states in real slots, uploaders that die on demand, and what must hold of the store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dtr.checkpoint import parts
from dtr.checkpoint.delta.chunks import is_recipe
from dtr.checkpoint.delta.collection import CONDEMNED
from dtr.checkpoint.delta.damage import DAMAGED
from dtr.checkpoint.delta.source import ChunkSource, recipe_of
from dtr.checkpoint.format.replication import Shares
from dtr.checkpoint.format.structure import Structures
from dtr.checkpoint.restoring.fetch import read_state
from dtr.checkpoint.staging.device import Cuda
from dtr.checkpoint.staging.slots import SlotRecord
from tests.staged import PlainLayout
from tests.uploads import ROOT, Training

CHUNK_BYTES = 64 << 10  # what CHUNK_BYTES is replaced by, so that small states have many chunks


def file_of(state: Any, about: dict[str, str], shares: Shares | None = None) -> tuple[bytearray, str]:
    """The part of a state as it would be staged, and the digest of what is replicated in it."""
    laid = Structures().lay_out(state, about, shares)
    content = bytearray(laid.size_bytes)
    assert laid.copy_into(content, Cuda()) is None
    return content, laid.structure


def weights(seed: int, *, frozen: int = 0, size: int = 12) -> dict[str, Any]:
    """A state of ``size`` tensors of two chunks each and a few small ones; the first ``frozen`` are alike whatever the seed."""
    state = {}
    for n in range(size):
        chooser = np.random.default_rng([n, 0 if n < frozen else seed + 1])
        state[f"w{n:02d}"] = chooser.random(CHUNK_BYTES // 4, dtype=np.float32)
    small = {f"b{n}": np.full(100, seed if frozen < size else 0, np.float32) for n in range(5)}
    return {"model": state, "small": small, "lr": 0.1}


def same(one: Any, other: Any) -> bool:
    """Whether two such states are alike."""
    return all(np.array_equal(one[top][name], other[top][name]) for top in ("model", "small") for name in other[top])


class Chunked(Training):
    """Trainers whose saves ask for delta."""

    def stage_state(self, step: int, state: Any, rank: int = 0) -> SlotRecord:
        """One rank's state, complete in a slot and known to Redis."""
        content, _ = file_of(state, {"step": str(step)})
        slot = self.arenas[rank].acquire(len(content))
        assert slot is not None
        who = self.members[rank]
        record = slot.write(
            PlainLayout(len(content)),
            {"x": content},
            SlotRecord(
                job=self.job, run=self.run.id, step=step, rank=rank, world_size=len(self.members), worker=who.worker_id,
                incarnation=who.incarnation, host=self.host, store=self.store_url, delta="auto",
            ),
        )  # fmt: skip
        part = parts.StagedPart(size_bytes=record.size_bytes, save=record.save)
        parts.begin(self.state, who.state_id, self.spec(step), self.fence(rank), part)
        return record

    def commit_state(self, step: int, state: Any) -> None:
        """Stage, upload and commit."""
        self.stage_state(step, state)
        assert self.settled(step) == "COMMITTED"

    def restored(self, step: int, rank: int = 0) -> Any:
        """The state as a reader gets it."""
        (part,) = (part for part in self.manifest(step).parts if part.rank == rank)
        source = ChunkSource(self.store, part)
        try:
            return read_state({rank: source}, rank=rank, world_size=len(self.members))
        finally:
            source.close()

    def chunks(self) -> set[str]:
        """The chunks in the store."""
        return {key for key in self.store.list("chunks") if not key.startswith((CONDEMNED, DAMAGED))}

    def named(self, step: int) -> set[str]:
        """The chunks that a commit names."""
        return {chunk.key for part in self.manifest(step).parts for chunk in recipe_of(self.store, part).chunks}

    def recipes(self) -> list[str]:
        return [key for key in self.store.list("runs") if is_recipe(key)]

    def condemned(self) -> list[str]:
        return list(self.store.list(CONDEMNED))

    def damaged(self) -> list[str]:
        return list(self.store.list(DAMAGED))

    def retire(self, step: int) -> None:
        """What retention does to a checkpoint when the readers' grace has passed, without what keeps the newest from it."""
        from dataclasses import replace

        from dtr.checkpoint.survey import manifest_key

        manifest = self.manifest(step)
        self.store.put(manifest_key(self.run.id, step), replace(manifest, decision="tombstone", reason="test").encode())
        for part in manifest.parts:
            self.store.delete(part.object)


PRELUDE = f"""
import dtr.checkpoint.delta.chunks as chunks, dtr.checkpoint.delta.carrying as delta
chunks.cut.__kwdefaults__["chunk_bytes"] = {CHUNK_BYTES}
"""

COLLECT = """
import sys
from dtr.checkpoint.delta.collection import collect_chunks
from dtr.store import open_store
print(len(collect_chunks(open_store(sys.argv[1]).child(sys.argv[2])).deleted), flush=True)
"""

UPLOAD = (
    PRELUDE
    + """
import sys
from dtr.checkpoint.uploading.upload import Limits, Uploader
url, staging, host, job, run, step = sys.argv[1:]
uploader = Uploader(redis_url=url, staging=staging, host=host, limits=Limits(lease_s=0.6, max_attempts=3))
print(uploader.upload_part(job, run, int(step), 0), flush=True)
"""
)


def _child(text: str, *arguments: str, fault: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if fault:
        env |= {"DTR_FAILPOINT": fault, "DTR_TESTING": "1"}
    return subprocess.Popen([sys.executable, "-c", text, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def uploading(training: Chunked, step: int, *, fault: str = "") -> subprocess.Popen[str]:
    """A process that uploads rank 0's part, with a fault on its way."""
    return _child(UPLOAD, training.url, training.staging, training.host, training.job, training.run.id, str(step), fault=fault)


def collecting(training: Chunked, *, fault: str = "") -> subprocess.Popen[str]:
    """A process that collects chunks, with a fault on its way."""
    return _child(COLLECT, training.store_url, training.job, fault=fault)


def folder_of(training: Chunked) -> Path:
    """Where the job's store is."""
    return Path(training.store_url.removeprefix("file://")) / training.job
