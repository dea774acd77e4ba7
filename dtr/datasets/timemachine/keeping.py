"""The journal's way into the store, and data sets' way back: what the uploader writes before a manifest, and what a rebuild reads.
See :mod:`dtr.datasets.timemachine.journal` for the protocol.

    journal/RUN/STEP.json.gz       what the steps through STEP consumed; the uploader puts it before the manifest
    datasets/NAME/DIGEST.json.gz   a data set that they consumed; put before the journal
    skips/NAME/SAMPLES.json        a person's word; put as soon as Redis has it, so that it needs no checkpoint to outlive Redis

Anyone may do this at once, or be killed between any two lines: every object is put if it is absent, and whoever comes second has nothing
else to say. Nothing here stops a commit but a store that is away: a journal that cannot be made is a line in the log.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import orjson

from dtr.datasets.consuming.datastate import parse_all
from dtr.datasets.plane import accounts_of
from dtr.datasets.registering import described
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.timemachine import journal
from dtr.datasets.timemachine.skipping import tell_skip
from dtr.datasets.timemachine.skips import Skip, Skips, merged_skips, parse_skips
from dtr.errors import AlreadyExists, DatasetNotFound, InvalidInput, NotFound, StateCorrupt
from dtr.failpoints import failpoint
from dtr.state.job import JobState
from dtr.store import Store

__all__ = ["keep_journal", "keep_skip", "kept_skips", "refill"]

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
    """Tell a Redis that was emptied the data sets of a commit's data state, and what people took out of any; what it knows stays.

    A data set that the store does not have is registered by its trainers, as it was at first.

    Args:
        state, store: of the job.
        data: the data state of the newest commit; {} without one.

    Raises StoreUnavailable, CoordinatorUnavailable.
    """
    try:
        states = parse_all(data)
    except (StateCorrupt, InvalidInput) as exc:
        log.error("no data set is put back: %s", exc)
        return
    skips = kept_skips(store)
    for name, one in states.items():
        skips[name] = merged_skips(skips.get(name, {}), one.skips)
    for name, of in skips.items():
        for target, skip in of.items():
            tell_skip(state, name, target, skip)
    for name, one in states.items():
        try:
            dataset = described.decode(store.get(described.key_of(name, one.digest)), name, one.digest)
        except (NotFound, StateCorrupt) as exc:
            log.info("data set %s is not put back: %s", name, exc)
            continue
        if DatasetRegistry(state.url, job=state.job, client=state.redis).put_back(dataset):
            log.info("data set %s version %d is known again", name, dataset.spec.version)


def keep_skip(store: Store, name: str, target: str, skip: Skip) -> None:
    """Put a person's word into the store; the first record of the same samples stands. Raises StoreUnavailable, StoreRefused."""
    key = f"skips/{name}/{hashlib.sha256(target.encode()).hexdigest()[:32]}.json"
    _put(store, key, orjson.dumps({target: skip.to_json()}))


def kept_skips(store: Store, name: str = "") -> dict[str, Skips]:
    """Data set -> the skips that the store has, of all or of one; a record that is not readable is a line in the log."""
    found: dict[str, Skips] = {}
    for key in store.list(f"skips/{name}" if name else "skips"):
        try:
            of, held = key.split("/")[1], parse_skips(orjson.loads(store.get(key)))
        except (NotFound, InvalidInput, orjson.JSONDecodeError) as exc:
            log.error("%s is no record of a skip: %s", key, exc)
            continue
        found[of] = merged_skips(found.get(of, {}), held)
    return found


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
