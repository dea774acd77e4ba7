"""What ``save_async`` returns: two futures and a word.

``staged`` is done when the state is in its slot and the trainer may change it; ``durable`` when the checkpoint is committed, and not
before. Neither can be cancelled: a save that was begun ends as the state machine says.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

__all__ = ["Commit", "SaveHandle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A checkpoint that is in the store, whole: ``seconds`` from the call of ``save_async`` until this process knew."""

    run: str
    step: int
    size_bytes: int
    seconds: float


class SaveHandle:
    """One save.

    Attributes:
        run, step: of the checkpoint.
        staged: done when the trainer may go on; ``await handle`` waits for it and gives the handle itself.
        durable: a :class:`Commit`, or raises CheckpointAborted, CheckpointAbandoned or CheckpointConflict with the reason. It stays
            pending while Redis, the store or the uploader is away: the bytes are safe in their slot meanwhile.
        state: a word for people: STAGED, WRITING, SEALED, ABORTING, COMMITTED, ABORTED, ABANDONED, CONFLICT, SKIPPED, FAILED or CLOSED.
    """

    __slots__ = ("__weakref__", "durable", "run", "staged", "state", "step")

    def __init__(self, run: str, step: int) -> None:
        self.run, self.step = run, step
        self.state = "STAGED"
        self.staged: Future[None] = Future()
        self.durable: Future[Commit] = Future()
        for future in (self.staged, self.durable):
            future.set_running_or_notify_cancel()

    def __repr__(self) -> str:
        return f"SaveHandle(run={self.run!r}, step={self.step}, state={self.state!r})"

    def __await__(self) -> Generator[Any, None, SaveHandle]:
        if not self.staged.done():
            yield from asyncio.shield(asyncio.wrap_future(self.staged)).__await__()
        self.staged.result()
        return self

    def commit(self, found: Commit) -> None:
        """The checkpoint is committed. For the publisher; the first end of a handle counts."""
        if not self.durable.done():
            self.state = "COMMITTED"
            with contextlib.suppress(InvalidStateError):
                self.durable.set_result(found)

    def fail(self, state: str, error: Exception) -> None:
        """The checkpoint will not be committed. For the publisher; the first end of a handle counts."""
        if not self.durable.done():
            self.state = state
            with contextlib.suppress(InvalidStateError):
                self.durable.set_exception(error)
