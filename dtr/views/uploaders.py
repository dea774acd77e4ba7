"""Is anyone there to upload for the hosts of a job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from dtr.state.job import JobState
from dtr.state.keys import uploader
from dtr.views.checkpoints import CheckpointView
from dtr.views.reading import reading
from dtr.views.workers import WorkerView

__all__ = ["UploaderView", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UploaderView:
    """The uploader of a host that has members of this job, or parts in its slots; ``fields`` are what it says of itself."""

    host: str
    present: bool
    members: int
    waiting_parts: int
    fields: dict[str, str]

    @property
    def stuck_s(self) -> int:
        """How long parts have waited there though no process is busy; 0: they do not, or it does not say."""
        said = self.fields.get("stuck_s", "")
        return int(said) if said.isascii() and said.isdigit() else 0


def read(state: JobState, members: Collection[WorkerView], ckpts: Collection[CheckpointView]) -> tuple[UploaderView, ...]:
    """Every host that needs an uploader for this job, by name.

    Raises:
        CoordinatorUnavailable, StateCorrupt.
    """
    trains = Counter(worker.host for worker in members if worker.host)
    waits = Counter(part.host for ckpt in ckpts for part in ckpt.parts or () if part.host and part.state == "staged")
    hosts = sorted(trains | waits)
    with reading(state):
        pipeline = state.redis.pipeline(transaction=False)
        for host in hosts:
            pipeline.hgetall(uploader(host))
        replies = pipeline.execute()
    return tuple(
        UploaderView(host=host, present=bool(fields), members=trains[host], waiting_parts=waits[host], fields=fields)
        for host, fields in zip(hosts, replies, strict=True)
    )
