"""One rank's part as bytes: a safetensors file whose metadata holds the tree, so that it is readable without dtr.

``lay_out`` places a state, ``read_state`` fetches, verifies and rebuilds one: in parallel into memory that was allocated once, the
checksum computed piece by piece behind the read, the arrays writable views of that memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from dtr.checkpoint import checksum, tensors, tree
from dtr.checkpoint.build import unflatten
from dtr.checkpoint.manifest import PartFacts
from dtr.checkpoint.patience import patiently
from dtr.checkpoint.tensors import Layout, Tensor
from dtr.clock import SYSTEM, Clock
from dtr.errors import ChecksumMismatch, IntegrityError, NotFound
from dtr.store import Store

__all__ = ["lay_out", "read_bytes", "read_state"]

TREE: Final = "dtr_tree"
_SLICE_BYTES: Final = 128 << 20


def lay_out(state: Any, about: Mapping[str, str]) -> tuple[Layout, dict[str, Tensor]]:
    """Place a state: its layout and the tensors to copy. ``about`` is for people who look into the file.

    Raises:
        UnsupportedLeaf: a value that a checkpoint cannot keep; names its path.
    """
    spec, leaves = tree.flatten(state)
    return tensors.arrange(leaves).layout({**about, TREE: tree.encode(spec)}), leaves


def read_state(store: Store, part: PartFacts, *, patience_s: float, clock: Clock = SYSTEM) -> Any:
    """Read one part, verify it and rebuild the state.

    Args:
        store: of the job.
        part: what the manifest says of it.
        patience_s: how long a store that is away is tried: an older checkpoint would not be nearer.
        clock: for that.

    Raises:
        IntegrityError: missing, of another size, another checksum, or no part.
        StoreUnavailable: it stayed away.
    """
    whole = patiently(lambda: read_bytes(store, part), patience_s=patience_s, what=f"object {part.object} can be read", clock=clock)
    found = tensors.read(whole)
    if TREE not in found.metadata:
        raise IntegrityError(f"object {part.object} is a safetensors file, but no part of a checkpoint: it holds no {TREE}")
    return unflatten(tree.decode(found.metadata[TREE]), found.tensors)


def read_bytes(store: Store, part: PartFacts) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The object of ``part`` in new memory, its size and checksum verified."""
    there = _size(store, part)
    if there != part.size_bytes:  # asked first: a manifest that declares 10**15 bytes must not make us allocate them
        raise IntegrityError(f"object {part.object} has {there} bytes, its manifest says {part.size_bytes}")
    whole = np.empty(part.size_bytes, np.uint8)
    running = checksum.Running()
    slices = [whole[start : start + _SLICE_BYTES] for start in range(0, part.size_bytes, _SLICE_BYTES)]
    with ThreadPoolExecutor(1, thread_name_prefix="dtr-read") as pool:
        ahead = None
        for n, piece in enumerate(slices):
            count = ahead.result() if ahead is not None else store.read_into(part.object, piece.data, n * _SLICE_BYTES)
            if count != len(piece):
                raise IntegrityError(f"object {part.object} ended after {n * _SLICE_BYTES + count} of {part.size_bytes} bytes")
            ahead = None
            if n + 1 < len(slices):
                ahead = pool.submit(store.read_into, part.object, slices[n + 1].data, (n + 1) * _SLICE_BYTES)
            running.update(piece)
    if running.text != part.checksum:
        raise ChecksumMismatch(f"object {part.object} has checksum {running.text}, its manifest says {part.checksum}")
    return whole


def _size(store: Store, part: PartFacts) -> int:
    try:
        return store.size(part.object)
    except NotFound as exc:
        raise IntegrityError(f"object {part.object} is missing") from exc
