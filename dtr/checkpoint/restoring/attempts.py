"""How often a collective restore tried each checkpoint since one succeeded: counted in Redis, for all runs of the job.

A checkpoint that was tried ``restore_attempts`` times and never restored is *quarantined*: found damaged, too large for a rank's memory,
or whoever reads it dies. It is then passed over, with the reason, as long as there is another one. ``restore(step=...)`` tries it all the
same, and a restore that succeeds clears it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dtr.checkpoint.lineage import Checkpoint, split_name
from dtr.errors import StateCorrupt
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["Tally", "quarantined", "tallies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """One checkpoint's count: ``begun`` since it was last restored, of which ``damaged`` found it so; ``reason`` is the last rank's no."""

    begun: int = 0
    damaged: int = 0
    reason: str = ""


def tallies(state: JobState) -> dict[Checkpoint, Tally]:
    """What Redis counted; nothing of what was restored since, or was never tried.

    Raises:
        StateCorrupt: the key holds what is no count.
        CoordinatorUnavailable.
    """
    key = state.keys.restores
    with translate(state.url):
        held: dict[str, str] = state.redis.hgetall(key)
    found: dict[Checkpoint, dict[str, str]] = {}
    for field, value in held.items():
        name, _, what = field.rpartition("/")
        if (checkpoint := split_name(name)) is not None:
            found.setdefault(checkpoint, {})[what] = value
    try:
        return {
            checkpoint: Tally(begun=int(facts.get("begun", 0)), damaged=int(facts.get("damaged", 0)), reason=facts.get("reason", ""))
            for checkpoint, facts in found.items()
        }
    except ValueError as exc:
        raise StateCorrupt(f"{key} holds what is no count: {exc}") from exc


def quarantined(counted: Mapping[Checkpoint, Tally], limit: int) -> dict[Checkpoint, str]:
    """Those that are passed over, each with the reason. Pure; ``limit`` 0: none."""
    return {
        checkpoint: f"is quarantined: tried {tally.begun} times and never restored, {_last(tally)}; "
        f"restore(step={checkpoint[1]}) tries it all the same"
        for checkpoint, tally in counted.items()
        if limit and tally.begun >= limit
    }


def _last(tally: Tally) -> str:
    return f"the last because {tally.reason}" if tally.reason else "no rank said why: it may be what they died of"
