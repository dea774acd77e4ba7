"""Chunks that were found to be wrong: whoever reads one puts that on record, and no save uses it again.

    chunks/damaged/HASH-NONCE    empty: the chunk of this name has other bytes than were stored

A save that needs the same bytes stores them anew under its own nonce, so the next commit is whole; what names the damaged chunk stays
damaged. A chunk that is missing or too short needs no record: each save looks for what it would use again. One that is right, and was
misread, costs its bytes once more.

The record goes once the chunk is gone, which is for good, since no name of a chunk is written again. It was put after the chunk, so a
collector lists the records first, and the chunks then: one whose chunk it does not find belongs to none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from dtr.checkpoint.delta.chunks import FOLDER
from dtr.errors import DtrError
from dtr.store import Store

__all__ = ["DAMAGED", "damaged", "forget_damage", "note_damage"]

log = logging.getLogger(__name__)

DAMAGED: Final = f"{FOLDER}/damaged"


def note_damage(store: Store, key: str) -> None:
    """Put it on record that the chunk ``key`` is wrong; who may not write, or cannot just now, only says so."""
    try:
        store.put(_record(key), b"")
    except DtrError as exc:
        log.warning("%s is damaged, and the next save does not know that: %s", key, exc)


def damaged(store: Store) -> frozenset[str]:
    """The keys of the chunks that are on record as wrong."""
    names = [key.rpartition("/")[2] for key in store.list(DAMAGED)]
    return frozenset(f"{FOLDER}/{name[:2]}/{name}" for name in names)


def forget_damage(store: Store, keys: Iterable[str]) -> None:
    """Remove the records of chunks that are gone."""
    for key in keys:
        store.delete(_record(key))


def _record(key: str) -> str:
    return f"{DAMAGED}/{key.rpartition('/')[2]}"
