"""The journal's way into the store, and data sets' way back: what the uploader writes before a manifest, and what a rebuild reads.
See :mod:`dtr.datasets.timemachine.journal` for the protocol.

Anyone may do this at once, or be killed between any two lines: every object is put if it is absent, and whoever comes second has nothing
else to say. Nothing here stops a commit but a store that is away: a journal that cannot be made is a line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dtr.datasets.consuming.datastate import parse_all
from dtr.datasets.plane import accounts_of
from dtr.datasets.registering import described
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.timemachine import journal
from dtr.datasets.timemachine.skipping import tell_skip
from dtr.errors import AlreadyExists, DatasetNotFound, InvalidInput, NotFound, StateCorrupt
from dtr.failpoints import failpoint
from dtr.state.job import JobState
from dtr.store import Store

__all__ = ["keep_journal", "refill"]

log = logging.getLogger(__name__)


def keep_journal(state: JobState, store: Store, run: str, step: int, shares: Mapping[int, str]) -> None:
    """Put into the store what the steps through ``step`` consumed, and the data sets that they did it of.

    Args:
        state, store: of the job.
        run, step: of the checkpoint that is about to be committed.
        shares: rank -> its share of the data state.

    Raises StoreUnavailable, CoordinatorUnavailable: the commit waits.
    """
    try:
        accounts = accounts_of(shares)
    except StateCorrupt as exc:
        log.error("run %s step %d: what its steps consumed is not kept: %s", run, step, exc)
        return
    if not any(accounts.values()):
        return
    origins = {(name, account.origin.digest, account.origin.version) for of in accounts.values() for name, account in of.items()}
    for name, digest, version in sorted(origins):
        _keep_dataset(state, store, name, digest, version)
    failpoint("commit.before_journal")
    _put(store, journal.journal_key(run, step), journal.encode(job=state.job, run=run, step=step, accounts=accounts))
    failpoint("commit.after_journal")


def refill(state: JobState, store: Store, data: Mapping[str, Any]) -> None:
    """Tell a Redis that was emptied the data sets of a commit's data state, and what people took out of them; what it knows stays.

    A data set that the store does not have is registered by its trainers, as it was at first.

    Raises StoreUnavailable, CoordinatorUnavailable.
    """
    try:
        states = parse_all(data)
    except (StateCorrupt, InvalidInput) as exc:
        log.error("no data set is put back: %s", exc)
        return
    for name, one in states.items():
        for target, skip in one.skips.items():
            tell_skip(state, name, target, skip)
        try:
            dataset = described.decode(store.get(described.key_of(name, one.digest)), name, one.digest)
        except (NotFound, StateCorrupt) as exc:
            log.info("data set %s is not put back: %s", name, exc)
            continue
        if DatasetRegistry(state.url, job=state.job, client=state.redis).put_back(dataset):
            log.info("data set %s version %d is known again", name, dataset.spec.version)


def _keep_dataset(state: JobState, store: Store, name: str, digest: str, version: int) -> None:
    key = described.key_of(name, digest)
    try:
        store.size(key)
    except NotFound:
        try:
            dataset = DatasetRegistry(state.url, job=state.job, client=state.redis).get(name, version)
        except (DatasetNotFound, StateCorrupt) as exc:
            log.warning("the files of data set %s are not kept in the store: %s", name, exc)
            return
        if dataset.spec.digest == digest:
            _put(store, key, described.encode(dataset))


def _put(store: Store, key: str, content: bytes) -> None:
    try:
        store.put(key, content, if_absent=True)
    except AlreadyExists:
        log.debug("%s is there already", key)
