"""What the demo was asked to do, checked."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Final

from dtr import names
from dtr.errors import InvalidInput
from dtr.store import open_store

__all__ = ["BATCH", "SHARD_SIZE", "Options"]

MOST_WORKERS: Final = 16
MOST_STEPS: Final = 100_000
BATCH: Final = 96
SHARD_SIZE: Final = 100  # batches do not fit into it evenly, so that saves find shards half consumed
_SAVES: Final = 12
_EPOCHS: Final = 2.5  # so that one epoch ends after the kill, and another one after the replacement came


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of ``dtr demo``.

    Args:
        workers: trainers; 1 only without a kill, since somebody has to notice.
        steps: optimizer steps; at least 2, since the loss is to fall, and 8 with a kill.
        store: where checkpoints go, and stay; None: into the demo's own folder.
        kill: whether one trainer gets SIGKILL midway.
        keep: whether the demo's folder stays.
        json: whether the outcome is printed as one JSON object, and all else on stderr.
        hidden: units of the model's hidden layer: what makes the state large.
        corpus_bytes: how much of the standard library is read at most.
        cwd: where the demo was started.
        rejoin_after_s: how long the replacement of the killed trainer takes to come.

    Raises:
        InvalidInput: names the field.
        ConfigError: the store is none; the message has what was given.
    """

    workers: int = 4
    steps: int = 400
    store: str | None = None
    kill: bool = True
    keep: bool = False
    json: bool = False
    hidden: int = 2048
    corpus_bytes: int = 6_000_000
    cwd: str = field(default_factory=os.getcwd)
    rejoin_after_s: float = 5.0

    def __post_init__(self) -> None:
        names.positive(self.workers, "workers", MOST_WORKERS)
        names.positive(self.steps, "steps", MOST_STEPS)
        names.positive(self.hidden, "hidden", 1 << 16)
        names.positive(self.corpus_bytes, "corpus-bytes", 1 << 30)
        if not 0 <= self.rejoin_after_s <= 600:
            raise InvalidInput(f"rejoin-after must be from 0 to 600 seconds, got {self.rejoin_after_s:g}", field="rejoin-after")
        if self.kill and self.workers == 1:
            raise InvalidInput("workers must be at least 2, because one is killed and the others notice; or add --no-kill", field="workers")
        if self.kill and self.steps < 8:
            raise InvalidInput(f"steps must be at least 8 to kill a trainer midway, got {self.steps}; or add --no-kill", field="steps")
        if self.steps < 2:
            raise InvalidInput(f"steps must be at least 2, so that the loss can fall from one to the next, got {self.steps}", field="steps")
        if self.store is not None:
            open_store(self.store).close()  # refuses what is none, in the words of whoever gave it

    @property
    def fewest_workers(self) -> int:
        """With how many trainers the job goes on."""
        return max(1, self.workers - 1)

    def samples(self, text_bytes: int) -> int:
        """How many samples the data should have, each with so much text, so that these steps go through them more than twice."""
        wanted = int(self.steps * self.workers * BATCH / _EPOCHS)
        return max(1, min(wanted, self.corpus_bytes // text_bytes))

    @property
    def save_every(self) -> int:
        """Steps from one save to the next."""
        return max(1, self.steps // _SAVES)

    @property
    def victim(self) -> int | None:
        """The launcher's number of the trainer that is killed; not 0, which writes the checkpoints."""
        return self.workers // 2 if self.kill else None

    @property
    def kill_at(self) -> int:
        """The step in which a trainer is killed: about midway between two saves, so that there is something to do again."""
        middle = self.steps * 2 // 5 // self.save_every * self.save_every
        return middle + self.save_every // 2

    def store_in(self, folder: str, stamp: str) -> str:
        """The URL of this demo's store: below the one that was given, in a place of its own, so that no older job is found there."""
        if self.store is None:
            return f"file://{folder}"
        with contextlib.closing(open_store(self.store)) as given:
            return given.child(stamp).url
