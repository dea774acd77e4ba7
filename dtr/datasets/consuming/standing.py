"""Where all ranks of a run stand after a batch, as one of them learns it from the ledger, for `Loader.state_dict`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from redis.client import NEVER_DECODE

from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.cut import cut_at, handed_out
from dtr.datasets.consuming.datastate import Dynamic, merged
from dtr.datasets.consuming.ledger import Ledger
from dtr.errors import DataConflict
from dtr.state.client import translate

__all__ = ["standing"]

POLL_S: Final = 0.02


def standing(ledger: Ledger, base: Dynamic, own: Dynamic, through: int) -> Dynamic:
    """The data state of all ranks after batch ``through`` of an epoch, the same whichever rank asks.

    Waits until every rank was given that batch, which is so at once if they meet in a collective at every step, and for
    ``barrier_timeout_s`` at most.

    Args:
        ledger: of the epoch.
        base: where the run began in it.
        own: what this rank consumed: its notes are added.
        through: the batch.

    Raises:
        DataConflict: a rank was not given the batch in time.
        StateCorrupt: a rank is so far ahead that the ledger has only sums of it.
        RosterChanged, CoordinatorUnavailable: the run ended, or Redis is away.
    """
    session, run, name = ledger.session, ledger.run, ledger.spec.name
    state, clock = session.state, session.clock
    deadline = clock.monotonic() + session.settings.barrier_timeout_s
    while True:
        session.check()
        with translate(state.url):
            fields: Any = state.redis.hgetall(ledger.keys.ledger)
        newest = handed_out(fields)
        late = sorted(rank for rank in range(run.world_size) if newest.get(rank, -1) < through)
        if not late:
            break
        if clock.monotonic() > deadline:
            raise DataConflict(
                f"data set {name!r}: ranks {', '.join(map(str, late[:8]))} were not given batch {through} of epoch {ledger.epoch} yet, so "
                "there is no state of all ranks after it: take state_dict() at the same step on every rank",
                name=name,
            )
        clock.sleep(POLL_S)
    with translate(state.url):
        # After the fields: what moved from them into the bitmap meanwhile is in both, and nothing is in neither.
        done: Any = state.redis.execute_command("GET", ledger.keys.done, **{NEVER_DECODE: True})
        bad: Any = state.redis.hgetall(ledger.quarantine_key)
    found = cut_at(name, base, fields, done or b"", through)
    left_out = {int(shard): reason for shard, reason in bad.items() if not ranges.contains(found.done, int(shard))}
    notes = {"quarantined": {ledger.epoch: left_out}} if left_out else {}
    everyone = merged(name, [replace(found, notes=notes), base, own])
    return everyone if isinstance(everyone, Dynamic) else found
