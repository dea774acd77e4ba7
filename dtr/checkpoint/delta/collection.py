"""Delete chunks that no recipe names, without a clock, beside any number of uploaders and collectors, each of which may die or sleep.

    collector                                     uploader (:mod:`dtr.checkpoint.delta.carrying`)
    list   the chunks, then read every recipe     intent     put the recipe
    W      put condemned/ID.json: what no         C          read every condemned list; of these nothing is used
           recipe named                           V          look for each chunk that is used again
    L      read every recipe again                send       new chunks, under names of this upload alone
    D      delete what still none names
    R      remove condemned/ID.json

Recipes of undecided checkpoints count like any other; they go with the checkpoint's decision or its retirement, and only then.

No chunk X that a standing recipe names is ever deleted. Suppose a collector K deletes X. K listed X before W, so the recipe of X's
writer was put before L. Let r be the first recipe that names X and whose intent was put after L began; its upload used X again. If it
read the lists (C) before R, it saw X on K's list, since W came before L and L before r's intent, and did not use X. If it read them after
R, then V came after D, and X was not there. So there is no such r: whoever names X did so before L, K saw it, and did not delete X.

A list whose collector died is worked off by the next one, as if it were its own; but it is removed only when none of its chunks exists
any more. Until then the dead one may only sleep: what it condemned is never used again, and is stored anew where it is needed. No name
of a chunk is ever written again by another upload, so a delete that comes late finds nothing.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from dtr.checkpoint import records
from dtr.checkpoint.delta.chunks import FOLDER, is_recipe, read_recipe
from dtr.checkpoint.delta.damage import damaged, forget_damage
from dtr.checkpoint.survey import in_parallel
from dtr.errors import ManifestInvalid, NotFound
from dtr.failpoints import failpoint
from dtr.store import Store

__all__ = ["Swept", "collect_chunks", "condemned"]

log = logging.getLogger(__name__)

CONDEMNED: Final = f"{FOLDER}/condemned"
_CHUNK: Final = re.compile(rf"{FOLDER}/([0-9a-f]{{2}})/\1[0-9a-f]{{62}}-[0-9a-f]+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a collection found: chunks that recipes name, and those that none does, which were deleted unless it only looked."""

    kept: int
    deleted: tuple[str, ...]


def condemned(store: Store) -> frozenset[str]:
    """Every chunk that some collector is about to delete.

    Raises:
        ManifestInvalid: a list is damaged, so nobody can tell what is on it.
    """
    return frozenset().union(*_lists(store).values())


def collect_chunks(store: Store, *, dry_run: bool = False) -> Swept:
    """Delete the chunks that no recipe names; safe at any time, and after any death goes on where it was.

    Args:
        store: of the job.
        dry_run: only look; ``deleted`` is what would be.

    Raises:
        ManifestInvalid: a recipe or a list is damaged, so that nobody knows what it names; then nothing was deleted.
        StoreUnavailable: the rest is done at the next call.
    """
    others = _lists(store)  # first: what is on them and not found below is gone
    wrong = damaged(store)  # before the chunks as well
    there = frozenset(key for key in store.list(FOLDER) if _CHUNK.fullmatch(key))
    if not there and not others and not wrong:
        return Swept(kept=0, deleted=())
    known: dict[str, frozenset[str]] = {}
    wanted = there - _named(store, known)
    if not wanted and not others and wrong <= there:
        return Swept(kept=len(there), deleted=())
    if dry_run:
        return Swept(kept=len(there) - len(wanted), deleted=tuple(sorted(wanted)))
    own = f"{CONDEMNED}/{secrets.token_hex(8)}.json"
    failpoint("chunks.before_condemn")
    if wanted:
        store.put(own, records.encode({"condemned": sorted(wanted)}), if_absent=True)
    failpoint("chunks.after_condemn")
    doomed = sorted(wanted - _named(store, known))
    failpoint("chunks.before_delete")
    for key in doomed:
        store.delete(key)
        failpoint("chunks.mid_delete")
    if wanted:
        store.delete(own)
    failpoint("chunks.before_forget")
    _remove_finished(store, others, there - set(doomed))
    forget_damage(store, wrong - (there - set(doomed)))
    if doomed:
        log.info("%s: %d of %d chunks belonged to no checkpoint any more, and are deleted", store.url, len(doomed), len(there))
    return Swept(kept=len(there) - len(doomed), deleted=tuple(doomed))


def _named(store: Store, known: dict[str, frozenset[str]]) -> frozenset[str]:
    """Every chunk that a recipe in the store names; ``known`` holds recipes that were read before, which never change."""
    keys = [key for key in store.list("runs") if is_recipe(key)]
    new = [key for key in keys if key not in known]
    known.update(zip(new, in_parallel(lambda key: _named_by(store, key), new), strict=True))
    return frozenset().union(*(known[key] for key in keys))


def _named_by(store: Store, key: str) -> frozenset[str]:
    try:
        return frozenset(chunk.key for chunk in read_recipe(store, key).chunks)
    except ManifestInvalid as exc:
        if exc.facts.get("missing"):  # it went between the listing and now, as its checkpoint's decision wanted it to
            return frozenset()
        raise


def _lists(store: Store) -> dict[str, frozenset[str]]:
    """What every collector has condemned, by the key of its list."""
    found = {}
    for key in list(store.list(CONDEMNED)):
        try:
            found[key] = frozenset(_listed(key, store.get(key)))
        except NotFound:
            continue  # its collector is through
    return found


def _listed(key: str, content: bytes) -> Iterable[str]:
    record = records.members(records.decode(content, f"object {key}"), {"condemned"}, f"object {key}")
    if type(record["condemned"]) is not list or not all(type(item) is str for item in record["condemned"]):
        raise ManifestInvalid(f"object {key} must be a list of chunks")
    return list(record["condemned"])


def _remove_finished(store: Store, lists: Mapping[str, frozenset[str]], left: frozenset[str]) -> None:
    """Remove the lists of others of which no chunk exists any more."""
    for key, listed in lists.items():
        if not listed & left:
            store.delete(key)
