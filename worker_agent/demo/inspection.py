"""A look at the job's checkpoints from outside, as anyone may take it when training is over: nothing of the trainers is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dtr.checkpoint.keeping.catalogue import Listed
from dtr.checkpoint.manager import CheckpointManager
from dtr.config import Settings
from dtr.errors import CheckpointError, IntegrityError
from dtr.state.client import translate
from dtr.state.job import JobState
from worker_agent.demo.corpus import DATASET
from worker_agent.demo.figures import Upload
from worker_agent.demo.model import Adam, ByteModel, Shape, digest, load

__all__ = ["Inspection", "inspect", "write_on"]

_PROMPT: Final = b"    def __init__("
_SAMPLE_BYTES: Final = 24
_SHARPNESS: Final = 3.0  # the likelier bytes only: a model that has learned for a minute is not sure of much


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What was found.

    Attributes:
        verified: ``RUN/STEP`` of each commit and what is wrong with it, empty if nothing is.
        restored: run and step of what a restore gave; None: nothing, and ``problem`` says why.
        digest: of that state.
        sample: what the restored model writes.
        data: where in its data the restored checkpoint says that it stands; None: it does not say.
        uploads: of each commit that Redis has on record.
    """

    verified: dict[str, str]
    restored: tuple[str, int] | None
    problem: str
    digest: str
    sample: str
    data: Mapping[str, Any] | None
    uploads: Sequence[Upload]


def inspect(settings: Settings, state: JobState, shape: Shape) -> Inspection:
    """List, verify and restore.

    Raises:
        Unavailable: the store or Redis cannot be reached.
    """
    with CheckpointManager(str(settings.store), settings=settings) as manager:
        listed = [entry for entry in manager.list() if entry.state not in {"ABORTED", "RETIRED"}]
        verified = {f"{entry.run}/{entry.step}": _problem(manager, entry) for entry in listed}
        uploads = _uploads(state, listed)
        try:
            found = manager.restore()
        except (CheckpointError, IntegrityError) as exc:
            return Inspection(verified=verified, restored=None, problem=exc.message, digest="", sample="", data=None, uploads=uploads)
    if found is None:
        raise ValueError("without fresh=True a restore that finds nothing raises")
    return Inspection(
        verified=verified,
        restored=(found.run, found.step),
        problem="",
        digest=digest(found.state),
        sample=_sample(found.state, shape),
        data=found.data.get(DATASET),
        uploads=uploads,
    )


def _problem(manager: CheckpointManager, entry: Listed) -> str:
    if entry.state == "DAMAGED":
        return entry.reason
    try:
        manager.verify(entry.run, entry.step)
    except IntegrityError as exc:
        return exc.message
    return ""


def _uploads(state: JobState, listed: Sequence[Listed]) -> list[Upload]:
    """From being announced until all of it was in the store, by the server's clock."""
    with translate(state.url):
        pipeline = state.redis.pipeline(transaction=False)
        for entry in listed:
            pipeline.hmget(state.keys.ckpt(entry.run, entry.step), ["created_at", "sealed_at"])
        times = pipeline.execute()
    return [
        Upload(size_bytes=entry.size_bytes, seconds=(int(sealed_at) - int(created_at)) / 1000)
        for entry, (created_at, sealed_at) in zip(listed, times, strict=True)
        if created_at and sealed_at
    ]


def _sample(state: Any, shape: Shape) -> str:
    model = ByteModel(shape, seed=0)
    load(state, model, Adam(shape.parameters))
    text = _PROMPT + write_on(model, _PROMPT, _SAMPLE_BYTES, seed=1)
    return text.decode("ascii", errors="replace").replace("\n", "\\n").strip()


def write_on(model: ByteModel, prompt: bytes, count: int, *, seed: int) -> bytes:
    """Let the model go on: ``count`` bytes drawn from its likelier choices; the same seed draws the same."""
    random = np.random.default_rng(seed)
    context = model.shape.context
    text = list(prompt.rjust(context, b"\n"))
    for _ in range(count):
        chances = model.next_byte(np.array(text[-context:], dtype=np.uint8)).astype(np.float64) ** _SHARPNESS
        text.append(int(random.choice(len(chances), p=chances / chances.sum())))
    return bytes(text[-count:])
