"""Skips of a job's data sets. Owns ``skips:NAME``, where a person's word goes, and whence each loader takes it.

    dtr data skip    writes it once; the same again changes nothing
    loader           looks at most once a second, in the thread that reads ahead; what was read before goes out as it is
    save             the rank's share says which skips it knows, and which samples of which epoch it left out for them
    manifest         has all that any rank knew; who restores it knows them, and tells Redis again what Redis has lost

So ranks may learn of a skip at different moments. That needs no agreement: each sample is one rank's to give, and that rank's alone to
leave out. In dynamic mode it holds for every sample that is ordered from then on. In deterministic mode the places of the epoch stay as
they are and the batch that would have had the sample is smaller, so every rank goes on through the same sequence of global batches,
whenever it learned; what was left out is in the data state by epoch and sample. Redis away: the skips that are known hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

import orjson

from dtr.datasets.consuming import ranges
from dtr.datasets.consuming.ranges import Ranges
from dtr.datasets.registering.spec import Dataset
from dtr.datasets.timemachine.skips import Skip, Skips, left_out, merged_skips, parse_skips
from dtr.errors import CoordinatorUnavailable, InvalidInput, StateCorrupt
from dtr.failpoints import failpoint
from dtr.session import Session
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["Skipping", "Split", "read_skips", "tell_skip"]

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0

Places = list[tuple[int, int]]  # shard and position
Split = Callable[[Places], tuple[Places, Places]]  # those that stay, and those that are left out


def tell_skip(state: JobState, name: str, target: str, skip: Skip) -> bool:
    """Put a skip on record; False if it was there. Raises CoordinatorUnavailable."""
    failpoint("skip.before_record")
    answer = state.call("dataset_skip", [state.keys.skips(name), state.keys.events], [name, target, skip.to_text(), skip.reason])
    failpoint("skip.after_record")
    return str(answer) == "new"


def read_skips(state: JobState, name: str) -> Skips:
    """The skips of a data set that Redis has. Raises CoordinatorUnavailable, StateCorrupt."""
    with translate(state.url):
        held: dict[str, str] = state.redis.hgetall(state.keys.skips(name))
    try:
        return parse_skips({target: orjson.loads(text) for target, text in held.items()})
    except (InvalidInput, orjson.JSONDecodeError) as exc:
        raise StateCorrupt(f"{state.keys.skips(name)} is not readable: {exc}") from exc


class Skipping:
    """What one loader leaves out. `look` and `of` belong to the thread that reads; `known` to any.

    Args:
        session: in a run.
        dataset: that is loaded.
        restored: of the state that the run goes on from.
    """

    def __init__(self, session: Session, dataset: Dataset, restored: Skips) -> None:
        self._session, self._dataset = session, dataset
        self.known: Skips = restored
        self._positions: Mapping[int, Ranges] = left_out(dataset, restored)
        self._look_at_s = -1.0
        self._count = -1

    def restored(self, skips: Skips) -> None:
        """The loader goes on from a state that has these."""
        self.known = merged_skips(self.known, skips)
        self._positions, self._look_at_s = left_out(self._dataset, self.known), -1.0

    def look(self) -> None:
        """Ask Redis for skips, if the last time is long ago; raises nothing for a Redis that is away."""
        now_s = self._session.clock.monotonic()
        if now_s < self._look_at_s:
            return
        self._look_at_s = now_s + LOOK_S
        state, name = self._session.state, self._dataset.spec.name
        try:
            with translate(state.url):
                count = int(state.redis.hlen(state.keys.skips(name)))
            if count == self._count and count == len(self.known):
                return
            found = read_skips(state, name)
            for target in self.known.keys() - found.keys():
                tell_skip(state, name, target, self.known[target])
        except (CoordinatorUnavailable, StateCorrupt) as exc:
            log.debug("data set %s: skips are those that were known: %s", name, exc)
            return
        self._count = count
        self.known = merged_skips(self.known, found)
        self._positions = left_out(self._dataset, self.known)

    def of(self, shard: int) -> Ranges:
        """The positions of a shard that are left out."""
        return self._positions.get(shard, ())

    def split(self, places: Places) -> tuple[Places, Places]:
        """Those of ``places``, (shard, position), that stay, and those that are left out."""
        if not self._positions:
            return places, []
        out = [place for place in places if ranges.contains(self.of(place[0]), place[1])]
        gone = set(out)
        return [place for place in places if place not in gone], out
