"""Orders read by processes, in the order in which they were given. They read files and nothing else: this process alone talks to Redis.

Guarantees: at most so many orders are out at once; a process that dies is an error here, not a wait; when this process dies, however, or
the generator is closed, they end. Order n goes to process n modulo their number, so a shard whose orders are of one lane is read once.

    spawn   (the default) begins anew, so a script needs its ``if __name__ == "__main__":``
    fork    takes over the memory of a process with threads; it is quicker, and what other threads held locked stays so in the child
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from concurrent.futures.process import BrokenProcessPool

from dtr.datasets.loading.batch import Batch, Order
from dtr.datasets.loading.fetch import Reader
from dtr.datasets.loading.plan import Reading
from dtr.errors import DataUnavailable

__all__ = ["read_by_processes"]

LOOK_S = 0.2

_reader: Reader | None = None


def read_by_processes(reader: Reader, orders: Iterator[Order], reading: Reading, check: Callable[[], None]) -> Iterator[Batch]:
    """The batches of ``orders``; ``check`` is called while it waits, and what it raises ends all.

    Raises DataUnavailable if a process died, and what `Reader` raises.
    """
    context = multiprocessing.get_context(reading.start)
    pools = [ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(reader,)) for _ in range(reading.processes)]
    out: deque[Future[Batch]] = deque()
    try:
        for n, order in enumerate(orders):
            out.append(pools[n % len(pools)].submit(_read, order))
            if len(out) >= reading.processes + 1:
                yield _result(out.popleft(), check)
        while out:
            yield _result(out.popleft(), check)
    except BrokenProcessPool as exc:
        raise DataUnavailable(f"a process that reads for {reader!r} died: out of memory? `dmesg` may tell; {exc}") from exc
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[Batch], check: Callable[[], None]) -> Batch:
    while True:
        try:
            return future.result(LOOK_S)
        except NotYet:
            if future.done():
                raise
            check()


def _begin(reader: Reader) -> None:
    global _reader
    _reader = reader
    threading.Thread(target=_end_with_parent, name="dtr-parent", daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed leaves nobody to tell the executor's queue."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(order: Order) -> Batch:
    if _reader is None:
        raise DataUnavailable("this process was not set up to read")
    return _reader(order)
