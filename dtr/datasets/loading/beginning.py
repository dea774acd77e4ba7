"""Where a loader begins, and with which version of its data set: a function of what the lineage consumed and of what is registered now.

    the same version            on from there
    another, between epochs     the next epoch is of the current version
    another, within an epoch    on with the earlier version; or, if asked to, the rest of the epoch is dropped, on record

Ranks that read the registry at different moments meet in the ledger, where the first fixes version and digest, and the others are refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from dtr.datasets.consuming.datastate import DataState
from dtr.datasets.consuming.goingon import abandoned, beginning, going_on, next_epoch
from dtr.datasets.consuming.ledger import Ledger
from dtr.datasets.loading.plan import Plan
from dtr.datasets.registering.registry import DatasetRegistry
from dtr.datasets.registering.spec import Dataset
from dtr.errors import DataConflict, DatasetNotFound
from dtr.session import Session

__all__ = ["Place", "place"]

log = logging.getLogger(__name__)

Place = tuple[Plan, DataState, int]  # what is loaded, from where on, and the version registered since, 0 for none


def place(
    session: Session, registry: DatasetRegistry, name: str, base: DataState | None, planned_for: Callable[[Dataset], Plan],
    on_new_version: str,
) -> Place:  # fmt: skip
    """Where the loader of a data set begins.

    Args:
        session: in the run.
        registry: of the job.
        name: of the data set.
        base: what the lineage consumed of it; None: nothing.
        planned_for: the plan for a version of it.
        on_new_version: ``next_epoch`` or ``abandon_epoch``.

    Raises:
        DatasetNotFound: there is no such data set.
        DataConflict: the base is of another sequence, of a version that nobody knows any more, or another rank began with another version.
        RosterChanged, CoordinatorUnavailable: the run ended, or Redis is away.
    """
    current = registry.get(name)
    plan = planned_for(current)
    if base is None:
        return plan, beginning(plan), 0
    if base.digest == current.spec.digest:
        return plan, going_on(plan, base), 0
    earlier, version = _version(registry, name, base), current.spec.version
    epoch = next_epoch(earlier, base)
    if epoch is not None:
        log.info("data set %s: epoch %d begins with version %d, the lineage had version %d", name, epoch, version, base.version)
        return plan, beginning(plan, epoch, base), 0
    if earlier is None:
        raise DataConflict(
            f"data set {name!r}: the restored lineage is in the middle of epoch {base.epoch} of version {base.version} with digest "
            f"{base.digest}, which is registered no more: register the data set as it was then, to finish the epoch",
            name=name,
        )
    if on_new_version == "next_epoch":
        log.warning(
            "data set %s: the restored lineage is in the middle of epoch %d of version %d, so that is loaded; version %d is taken by a run "
            "that begins at an epoch's start", name, base.epoch, base.version, version,
        )  # fmt: skip
        earlier_plan = planned_for(earlier)
        return earlier_plan, going_on(earlier_plan, base), version
    log.warning("data set %s: the rest of epoch %d of version %d is dropped, on record", name, base.epoch, base.version)
    start = beginning(plan, base.epoch + 1, abandoned(earlier, base))
    # A rank that does not know of the new version would go on in the epoch that this one leaves: one of the two is refused.
    Ledger(session, plan.dataset.spec, base.epoch).open(start)
    return plan, start, 0


def _version(registry: DatasetRegistry, name: str, base: DataState) -> Dataset | None:
    """The data set that a state is of, if it is still registered."""
    try:
        found = registry.get(name, base.version)
    except DatasetNotFound:
        return None
    return found if found.spec.digest == base.digest else None
