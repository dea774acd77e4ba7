"""Make one staged save known to Redis and to the uploader, and look how its checkpoint is doing. Thin: the publisher says when.

Killed between any two lines, nothing is lost: the slot is complete, and the uploader registers what Redis never heard of. A report
that a save came to nothing may be lost with the process that it was for.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from dtr import publish
from dtr.checkpoint import checksum, handover, parts
from dtr.checkpoint.format.replication import Shares, first_difference, sampled_in
from dtr.checkpoint.format.tensors import read_header
from dtr.checkpoint.parts import Fence, Spec, StagedPart
from dtr.checkpoint.saving.failures import Failed, report
from dtr.checkpoint.saving.handle import SaveHandle
from dtr.checkpoint.saving.progress import Meter, Sight, answered, ask
from dtr.checkpoint.staging.locks import try_lock
from dtr.checkpoint.staging.slots import Found
from dtr.errors import (
    CheckpointConflict,
    CheckpointError,
    CoordinatorUnavailable,
    IntegrityError,
    RosterChanged,
    RunUnknown,
    StaleIncarnation,
    StateLost,
)
from dtr.failpoints import failpoint
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["Save", "announce", "explained", "look"]

log = logging.getLogger(__name__)

_REPLICATED: Final = re.compile(
    r"begun with replicated (?P<begun>none|some|all) ?(?P<theirs>\w*), now it is (?P<now>none|some|all) ?(?P<ours>\w*)"
)


@dataclass(slots=True, kw_only=True, eq=False)
class Save:
    """One rank's share in one checkpoint, on its way from the slot to the decision.

    ``part`` and ``slot`` are None for a rank that writes nothing: another one writes the replicated state, or this one failed (``failed``
    says why). ``data`` is this rank's share of the data state, JSON. ``settle`` returns when it is fixed what the run continues.
    ``lost``: it came to nothing, which Redis is still to be told. ``trouble`` is why it is not published yet, ``upload_error`` why its part
    is not in the store. Times are monotonic seconds.
    """

    handle: SaveHandle
    spec: Spec
    fence: Fence
    state_id: str
    settle: Callable[[], None]
    started_s: float
    metrics: dict[str, float | None] = field(default_factory=dict)
    data: str = ""
    shares: Shares | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    part: StagedPart | None = None
    slot: Found | None = None
    failed: str = ""
    counter: str = ""
    own_checksum: str = ""
    lost: Failed | None = None
    unseen_since_s: float | None = None
    due_s: float = 0.0
    whole_due_s: float = 0.0
    pause_s: float = 0.0
    trouble: str = ""
    upload_error: str = ""
    meter: Meter = field(default_factory=Meter)

    @property
    def expected(self) -> range:
        """The ranks whose parts make the checkpoint complete."""
        writer = self.spec.writer
        return range(writer, writer + 1) if self.spec.replicated == "all" else range(self.spec.world_size)

    @property
    def part_rank(self) -> int:
        """The rank whose part holds what this one saved."""
        return self.spec.writer if self.spec.replicated == "all" else self.fence.rank


def announce(state: JobState, save: Save, recover_run: Callable[[], None], broker_url: str) -> None:
    """Publish one save; returns when Redis knows it.

    Args:
        state: the job, on a connection of the publisher's own.
        save: what to publish.
        recover_run: called when Redis does not know the save's run: tells it from the store.
        broker_url: where the uploader listens; without it the uploader finds the part by itself, a little later.

    Raises:
        CheckpointAborted, CheckpointAbandoned, CheckpointConflict: the checkpoint is over, or this step was saved before.
        Unavailable, Recovering, StateLost: not now.
    """
    if save.lost is not None:
        failpoint("save.before_report")
        report(state, save.state_id, save.fence, save.lost, save.id)
        failpoint("save.after_report")
        return
    save.settle()
    if save.failed:
        fail(state, save)
        return
    failpoint("save.before_begin")
    try:
        placed = _begin(state, save, recover_run)
    except CheckpointConflict as exc:
        told = explained(exc, save.fence.rank, _sampled(save))
        _part_company(state, save, told)
        raise told from exc
    failpoint("save.after_begin")
    _hand_over(state, save, recover_run, broker_url)
    if save.part is None or placed is None:
        return
    if placed.save != save.part.save:
        # This step was saved before with as many bytes: the first save is the part, and this one only has to hold the same.
        save.own_checksum = save.own_checksum or _checksum_of(save)
    elif placed.part_state != "done":
        _wake_uploader(state, save, broker_url)
    failpoint("save.after_enqueue")


def _hand_over(state: JobState, save: Save, recover_run: Callable[[], None], broker_url: str) -> None:
    """Tell this rank's share of the data state, also if it is nothing: others may have some. Valid after the run, too."""
    spec = save.spec
    if not save.data and spec.world_size == 1:
        return
    try:
        now = handover.hand_over(state, spec.run, spec.step, save.fence, save.data)
    except RunUnknown:
        recover_run()
        now = handover.hand_over(state, spec.run, spec.step, save.fence, save.data)
    if now == "SEALED":
        with contextlib.suppress(CoordinatorUnavailable):  # the uploader finds it by itself, a little later
            publish.settle(broker_url, host=save.fence.host, job=state.job, run=spec.run, step=spec.step)


def _wake_uploader(state: JobState, save: Save, broker_url: str) -> None:
    try:
        publish.upload_part(broker_url, host=save.fence.host, job=state.job, run=save.spec.run, step=save.spec.step, rank=save.fence.rank)
    except CoordinatorUnavailable as exc:
        log.info("the uploader was not woken, and finds step %d by itself: %s", save.spec.step, exc)


def explained(exc: CheckpointConflict, rank: int, sampled: Sequence[str] = ()) -> CheckpointConflict:
    """The same conflict for people: what ranks disagree about when they replicate, where the script compares digests.

    Args:
        exc: what the script answered to a rank that came second.
        rank: whose save it was.
        sampled: the tensors whose values it compares.
    """
    if (found := _REPLICATED.search(exc.message)) is None:
        return exc
    begun, now = found["begun"], found["now"]
    if begun == now:
        path = first_difference(found["theirs"], found["ours"], sampled)
        what = "tensors of other names, shapes or dtypes" if path is None else f"{path or 'tensors'} of other values"
        text = f"this step was begun with replicated {what} than rank {rank} has"
        return CheckpointConflict(f"{text}: what replicated= selects must be alike on all ranks", **exc.facts)
    words = {"none": "nothing", "some": "some of the state", "all": "all of it"}
    text = f"this step was begun with replicated {words[begun]}, and rank {rank} replicates {words[now]}"
    return CheckpointConflict(f"{text}: replicated= must be the same on all ranks", **exc.facts)


def _part_company(state: JobState, save: Save, exc: CheckpointConflict) -> None:
    """Others began this checkpoint otherwise, so it will never have this rank's part: abort it, unless an earlier save is that part."""
    view = parts.read(state, save.spec.run, save.spec.step, [save.fence.rank])
    if save.part is None or view is None or view.state != "WRITING" or save.fence.rank in view.parts:
        return
    save.failed = exc.message
    fail(state, save)


def fail(state: JobState, save: Save) -> None:
    """Tell the other ranks that this one has no part, so that nobody waits for it."""
    try:
        parts.fail(state, save.state_id, save.spec, save.fence, f"rank {save.fence.rank}: {save.failed}")
    except (StaleIncarnation, StateLost) as exc:
        log.info("nobody is left to be told that rank %d has no part of step %d: %s", save.fence.rank, save.spec.step, exc)


def _begin(state: JobState, save: Save, recover_run: Callable[[], None]) -> parts.Placed | None:
    try:
        return parts.begin(state, save.state_id, save.spec, save.fence, save.part)
    except (RosterChanged, StaleIncarnation, StateLost):
        if save.part is None:
            return None  # the writer's uploader registers it, or it is aborted in time
    # The run ended since the state was staged. A complete part counts all the same, as it does after its trainer's death.
    try:
        return parts.register(state, save.spec, save.fence, save.part)
    except CheckpointError as exc:
        if exc.facts.get("code") != "RUN_UNKNOWN":
            raise
    recover_run()
    return parts.register(state, save.spec, save.fence, save.part)


def _checksum_of(save: Save) -> str:
    with _content(save) as view:
        if view is None:
            raise CheckpointConflict(f"step {save.spec.step} was saved twice, and the second copy was gone before it could be compared")
        return checksum.of(view)


def _sampled(save: Save) -> list[str]:
    """The replicated tensors whose values were compared, as this save's part names them; none if that cannot be read any more."""
    with contextlib.suppress(OSError, IntegrityError), _content(save) as view:
        return sampled_in(read_header(view, len(view)).metadata) if view else []
    return []


@contextlib.contextmanager
def _content(save: Save) -> Iterator[memoryview | None]:
    """What this save put into its slot, which an uploader may have freed by now; None once somebody has filled it anew."""
    if save.slot is None or save.part is None:
        yield None
        return
    files, size_bytes = save.slot.files, save.part.size_bytes
    hold = try_lock(files.lock, shared=True)
    with hold or contextlib.nullcontext():
        record = files.read() if hold is not None else None
        if record is None or record.save != save.part.save:
            yield None
        elif size_bytes == 0:
            yield memoryview(b"")
        else:
            descriptor = os.open(files.data, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with mmap.mmap(descriptor, size_bytes, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as view:
                    yield view
            finally:
                os.close(descriptor)


def look(state: JobState, saves: Sequence[Save], *, whole: Collection[Save] = ()) -> list[Sight]:
    """How the checkpoints of ``saves`` are doing, in one round trip; all ranks' parts of those in ``whole``, else this rank's alone."""
    asked = [save.expected if save in whole else range(save.part_rank, save.part_rank + 1) for save in saves]
    with translate(state.url):
        pipeline = state.redis.pipeline(transaction=False)
        for save, ranks in zip(saves, asked, strict=True):
            ask(pipeline, state.keys, save.spec.run, save.spec.step, ranks)
        replies = iter(pipeline.execute())
    return [_of(save, answered(replies, ranks)) for save, ranks in zip(saves, asked, strict=True)]


def _of(save: Save, sight: Sight) -> Sight:
    mine = sight.part(save.part_rank)
    return sight if mine is None else replace(sight, checksum=mine.checksum)
