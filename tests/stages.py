"""The staging half of a save without a session: what a trainer's thread does, and nothing around it."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dtr.checkpoint.format import tensors, tree
from dtr.checkpoint.format.tree import TREE
from dtr.checkpoint.parts import Fence, Spec
from dtr.checkpoint.saving.announce import Save
from dtr.checkpoint.saving.handle import SaveHandle
from dtr.checkpoint.staging.slots import finish, open_for_reading, scan
from dtr.checkpoint.staging.stage import Stage
from dtr.config import Settings
from tests.staged import INCARNATION, RUN


def settings(staging: Path | str, **given: Any) -> Settings:
    """Of a job that nobody coordinates."""
    return Settings.load(staging=str(staging), job="job", environ={}, **{"slot_policy": "fail", **given})


def put(stage: Stage, given: Settings, state: Any, step: int = 1) -> tuple[Save, Future[None] | None]:
    """Stage one save of rank 0 of 1."""
    save = Save(
        handle=SaveHandle(RUN, step),
        spec=Spec(run=RUN, step=step, world_size=1, store="/none", replicated="none", writer=0),
        fence=Fence(rank=0, worker="w0", incarnation=INCARNATION, host="host-1"),
        state_id="x", settle=lambda: None, started_s=0.0,
    )  # fmt: skip
    session: Any = SimpleNamespace(settings=given, worker_id="w0")
    return save, stage.put(session, given, save, state)


def kinds(given: Settings) -> list[str]:
    """Of the slots that hold anything."""
    return [found.kind for found in scan(given.staging) if found.kind != "FREE"]


def take(given: Settings) -> Any:
    """The state in the only staged slot, which is free afterwards."""
    (found,) = [found for found in scan(given.staging) if found.kind == "STAGED"]
    with open_for_reading(found) as reading:
        part = tensors.read(bytearray(reading.buffer))
    assert finish(found, "committed")
    return tree.unflatten(tree.decode(part.metadata[TREE]), part.tensors)
