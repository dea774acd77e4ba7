"""Journals that may go: those of runs that the job left behind and of which no commit is left.

Guarantees: every step of the surviving lineage keeps its journal for good, however long ago its checkpoint went: that is what the time
machine is for, and costs one small object a commit. So does every run that a commit which still stands (one that is pinned, say) came
through. What goes could only be asked for by ``--run``, of a run whose every checkpoint was aborted or retired.

    list       the journals
    lineage    as Redis has it after that: a run whose journal was seen has begun by then
    survey     the records of all runs, and the decisions of those that are off the lineage
    delete     journals of runs of which each checkpoint was decided, and none is a commit, and through which no commit came

Where anything of this is not known (a record is damaged, a decision is not readable or not there yet, the newest run has not fixed what
it continues) the journals stay. Anyone may do this at once, or die in the middle: what is left goes the next time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Final

from dtr.checkpoint.lineage import Checkpoint, Lineage, Link, chain, head_of
from dtr.checkpoint.survey import in_parallel, links_of, read_manifest, records, survey
from dtr.datasets.timemachine.journal import journal_key
from dtr.errors import IntegrityError, NotFound
from dtr.failpoints import failpoint
from dtr.store import Store

__all__ = ["forsaken", "retire_journals"]

log = logging.getLogger(__name__)

_JOURNAL: Final = re.compile(r"journal/([^/]+)/(\d{12})\.json\.gz", re.ASCII)


def retire_journals(store: Store, lineage_now: Callable[[], Lineage | None], *, dry_run: bool = False) -> tuple[str, ...]:
    """Delete the journals that may go; which those are.

    Args:
        store: of the job.
        lineage_now: asks Redis for the lineage; None if nothing can be decided now.
        dry_run: only look.

    Raises StoreUnavailable, CoordinatorUnavailable: the rest goes at the next call.
    """
    journals = {(found[1], int(found[2])) for key in store.list("journal") if (found := _JOURNAL.fullmatch(key)) is not None}
    lineage = lineage_now() if journals else None
    if lineage is None or {run for run, _ in journals} <= {segment.run for segment in lineage.segments}:
        return ()
    holdings = survey(store)
    known = records(store, holdings)
    if not holdings.every_run <= known.keys():
        return ()  # a lineage may come through a run of which nobody knows what it continues
    links = links_of(known)
    off = sorted(name for name in holdings.decided if not lineage.takes(*name))
    left = dict(zip(off, in_parallel(lambda name: _is_gone(store, *name), off), strict=True))
    gone = sorted(forsaken(journals, lineage, links, left))
    for run, step in () if dry_run else gone:
        store.delete(journal_key(run, step))
        failpoint("journal.mid_delete")
    if gone and not dry_run:
        log.info("%s: %d journals of runs that the job left behind are deleted", store.url, len(gone))
    return tuple(journal_key(run, step) for run, step in gone)


def forsaken(journals: set[Checkpoint], lineage: Lineage, links: Mapping[str, Link], left: Mapping[Checkpoint, bool]) -> set[Checkpoint]:
    """Those of ``journals`` that may go. Pure.

    Args:
        journals: (run, step) of each.
        lineage: of the job.
        links: what each run continues.
        left: the decided checkpoints off the lineage -> whether it is certain that nothing of them can be restored.
    """
    kept = {segment.run for segment in (*lineage.segments, *chain(links, head_of(links.values())).segments)}
    standing = {run for (run, _), is_gone in left.items() if not is_gone} | {run for run, step in journals if (run, step) not in left}
    for run in standing - kept:
        kept.update(segment.run for segment in chain(links, run).segments)
    return {(run, step) for run, step in journals if run not in kept and run in links}


def _is_gone(store: Store, run: str, step: int) -> bool:
    try:
        return read_manifest(store, run, step).decision != "commit"
    except (IntegrityError, NotFound) as exc:
        log.warning("whether run %s step %d is a commit is not known, so its run's journals stay: %s", run, step, exc)
        return False
