"""What ``save_async`` returns: two futures, a word, and how far it is.

``staged`` is done when the state is in its slot and the trainer may change it; ``durable`` when the checkpoint is committed, and not
before. Neither can be cancelled: a save that was begun ends as the state machine says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, replace
from typing import Any

from dtr.checkpoint.saving.progress import PartProgress, SaveProgress, ended
from dtr.errors import InvalidInput

__all__ = ["Commit", "SaveHandle"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A checkpoint that is in the store, whole: ``seconds`` from the call of ``save_async`` until this process knew."""

    run: str
    step: int
    size_bytes: int
    seconds: float


class _Durable(Future["Commit"]):
    """Whoever waits in vain is told for what."""

    def __init__(self, run: str, step: int) -> None:
        super().__init__()
        self._run, self._step = run, step

    def result(self, timeout: float | None = None) -> Commit:
        try:
            return super().result(timeout)
        except TimeoutError as exc:
            if self.done():  # it was the save's own error
                raise
            raise TimeoutError(
                f"the save of step {self._step} in run {self._run} is not decided after {timeout:g} s; its bytes stay in their slot. "
                f"`dtr ckpt show {self._run} {self._step}` tells what it waits for"
            ) from exc


class SaveHandle:
    """One save.

    Attributes:
        run, step: of the checkpoint.
        staged: done when the trainer may go on; ``await handle`` waits for it and gives the handle itself.
        durable: a :class:`Commit`, or raises CheckpointAborted, CheckpointAbandoned or CheckpointConflict with the reason. It stays
            pending while Redis, the store or the uploader is away: the bytes are safe in their slot meanwhile.
        state: a word for people: STAGED, WRITING, SEALED, ABORTING, COMMITTED, ABORTED, ABANDONED, CONFLICT, SKIPPED, FAILED or CLOSED.
    """

    __slots__ = (
        "__weakref__",
        "_complained",
        "_nudge",
        "_on_progress",
        "_progress",
        "_told",
        "asked",
        "durable",
        "run",
        "staged",
        "state",
        "step",
    )

    def __init__(
        self, run: str, step: int, *, on_progress: Callable[[SaveProgress], object] | None = None, nudge: Callable[[], None] | None = None
    ) -> None:
        if on_progress is not None and not callable(on_progress):
            raise InvalidInput(f"on_progress must be a function of one argument, got {str(on_progress)[:60]!r}", field="on_progress")
        self.run, self.step = run, step
        self.state = "STAGED"
        self.asked = on_progress is not None  # for the publisher: somebody wants to see every rank
        self.staged: Future[None] = Future()
        self.durable: Future[Commit] = _Durable(run, step)
        self._on_progress, self._nudge, self._complained = on_progress, nudge, False
        self._progress = SaveProgress(run=run, step=step, state="STAGED")
        self._told: SaveProgress | None = None
        for future in (self.staged, self.durable):
            future.set_running_or_notify_cancel()

    def __repr__(self) -> str:
        return f"SaveHandle(run={self.run!r}, step={self.step}, state={self.state!r})"

    def __await__(self) -> Generator[Any, None, SaveHandle]:
        if not self.staged.done():
            yield from asyncio.shield(asyncio.wrap_future(self.staged)).__await__()
        self.staged.result()
        return self

    def progress(self) -> SaveProgress:
        """How far the checkpoint is, as Redis showed it at the last look, about a second ago; costs microseconds, never a round trip.

        The parts of the other ranks are looked at from the first call on: it may know this rank's part alone.
        """
        if not self.asked:
            self.asked = True
            if self._nudge is not None and not self.durable.done():
                self._nudge()
        return self._progress

    # --- for the publisher ------------------------------------------------------------------------------------------

    @property
    def seen(self) -> SaveProgress:
        """The newest progress; asks for nothing."""
        return self._progress

    def begin(self, part: PartProgress) -> None:
        """This rank's part is staged."""
        self._progress = replace(self._progress, parts=(part,), total_bytes=part.total_bytes or 0)

    def show(self, progress: SaveProgress) -> None:
        """What was seen; tells the user's function."""
        self._progress = progress
        self.tell()

    def tell(self) -> None:
        """Call the user's function with what is new, in this thread; what it raises is logged once and stops nothing."""
        now = replace(self._progress, age_s=None)  # that time has passed is no news
        if self._on_progress is None or self._told == now:
            return
        self._told = now
        try:
            self._on_progress(self._progress)
        except BaseException:  # also SystemExit: it would end the thread that later saves need
            if not self._complained:
                log.exception("on_progress of run %s step %d raised; it is called on, further errors are not logged", self.run, self.step)
            self._complained = True

    def commit(self, found: Commit) -> None:
        """The checkpoint is committed; the first end of a handle counts."""
        if not self.durable.done():
            self.state = "COMMITTED"
            with contextlib.suppress(InvalidStateError):
                self.durable.set_result(found)

    def fail(self, state: str, error: Exception) -> None:
        """The checkpoint will not be committed; the first end of a handle counts."""
        if not self.durable.done():
            self.state = state
            if self._progress.state != state:
                self._progress = ended(self._progress, state, str(error))
            with contextlib.suppress(InvalidStateError):
                self.durable.set_exception(error)
