"""Each rank's share of the data state of a step, on its way into the manifest. Owns ``ckpt:RUN:STEP:data``.

    save_async    the share is captured with the state, put into the slot and the part, and told at once by a report nobody waits for
    publisher     tells it again, and is told whether that sealed the checkpoint
    uploader      tells that of a slot whose trainer died
    commit        puts into the store what the steps consumed, merges all shares into the manifest, and lets go of them an hour later

A checkpoint of a run that loads data is sealed only when all ranks' shares are there, also those of ranks that have no part because another
writes the replicated state. A rank that died before it told its share takes the checkpoint with it: an older one has the older position.
"""

from __future__ import annotations

from typing import Any, Final

from dtr.checkpoint.parts import Fence
from dtr.state.client import translate
from dtr.state.job import JobState
from dtr.state.keys import Keys

__all__ = ["call_of", "hand_over", "is_needed", "let_go", "missing", "sealed_shares"]

KEEP_MS: Final = 7 * 86_400_000
DECIDED_KEEP_MS: Final = 3_600_000


def call_of(keys: Keys, run: str, step: int, who: Fence, share: str) -> tuple[list[str], list[Any]]:
    """Keys and arguments of the script ckpt_data."""
    return (
        [keys.meta, keys.run(run), keys.ckpt(run, step), keys.ckpt_data(run, step), keys.events],
        [run, step, who.rank, who.worker, who.incarnation, share, KEEP_MS],
    )


def hand_over(state: JobState, run: str, step: int, who: Fence, share: str) -> str:
    """Tell one rank's share; returns the checkpoint's state: SEALED when that was the last thing missing.

    Raises:
        RunUnknown: Redis does not know the run; rebuild it from the store, then try again.
        CheckpointError: this member was not in that run.
    """
    return str(state.call("ckpt_data", *call_of(state.keys, run, step, who, share)) or "")


def is_needed(state: JobState, run: str) -> bool:
    """Whether checkpoints of this run need the shares of all ranks: some rank loads data."""
    with translate(state.url):
        return bool(state.redis.hexists(state.keys.run(run), "data"))


def missing(state: JobState, run: str, step: int, world_size: int) -> list[int]:
    """The ranks whose shares have not come."""
    with translate(state.url):
        told = {int(rank) for rank in state.redis.hkeys(state.keys.ckpt_data(run, step))}
    return [rank for rank in range(world_size) if rank not in told]


def sealed_shares(state: JobState, run: str, step: int) -> dict[int, str] | None:
    """Rank -> its share of the data state; None if the checkpoint is not sealed, or not any more.

    Both are of one moment: where Redis was emptied since somebody saw that it is sealed, there are no shares, and none of them is not the
    same as nothing consumed.
    """
    with translate(state.url):
        pipeline = state.redis.pipeline(transaction=True)
        pipeline.hget(state.keys.ckpt(run, step), "state")
        pipeline.hgetall(state.keys.ckpt_data(run, step))
        now, shares = pipeline.execute()
    return {int(rank): share for rank, share in shares.items()} if now == "SEALED" else None


def let_go(state: JobState, run: str, step: int) -> None:
    """The checkpoint is decided, so its shares need not be kept for much longer: they may be long."""
    with translate(state.url):
        state.redis.pexpire(state.keys.ckpt_data(run, step), DECIDED_KEEP_MS)
