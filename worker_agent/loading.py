"""The agent's side of the data: what a trainer loads, evaluates on and asks for again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from dtr.config import Settings
from dtr.session import Session

if TYPE_CHECKING:
    from dtr.datasets.loading.batch import Batch
    from dtr.datasets.loading.evaluation import Evaluation
    from dtr.datasets.loading.loader import Loader
    from dtr.datasets.plane import DataPlane
    from dtr.datasets.registering.registry import DatasetRegistry

__all__ = ["Loading"]


class Loading:
    """The methods of :class:`worker_agent.agent.Agent` that are about data; no connection before the first of them is called."""

    settings: Settings
    _session: Session
    _datasets: DatasetRegistry | None = None

    @property
    def datasets(self) -> DatasetRegistry:
        """The job's data sets."""
        if self._datasets is None:
            from dtr.datasets.registering.registry import DatasetRegistry

            self._datasets = DatasetRegistry(self.settings.redis_url, job=self.settings.job, settings=self.settings)
        return self._datasets

    @property
    def _plane(self) -> DataPlane | None:
        """What this process loads; None if it has not asked for anything."""
        found = self._session.attached.get("data")
        return cast("DataPlane | None", found)

    def loader(
        self,
        name: str,
        *,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        epochs: int | None = 1,
        columns: Sequence[str] | None = None,
        seed: int | None = None,
        mode: str = "dynamic",
        tail: str = "empty",
        window: int | None = None,
        prefetch: int = 8,
        prefetch_bytes: int | None = None,
        processes: int = 0,
        start: str = "spawn",
        as_torch: bool = False,
        on_new_version: str = "next_epoch",
    ) -> Loader:
        """This rank's batches of a registered data set, from where the restored lineage stands; all ranks call it alike.

        ``batch["x"]`` is an array, ``len(batch)`` its samples, ``batch.epoch`` and ``batch.ranges`` say which. Pass each batch to
        :meth:`step` once it is trained on: that, and the save after it, is what makes its samples consumed. For validation take
        :meth:`evaluation`. See :class:`dtr.datasets.loading.loader.Loader` for what is guaranteed, and for ``torch.utils.data.DataLoader``.

        Args:
            name: as registered.
            batch_size: samples of each rank's batch, in dynamic mode.
            global_batch_size: samples of all ranks' batches together, in deterministic mode.
            epochs: until so many epochs of the lineage are over; None: without end.
            columns: to read; all if None.
            seed: of the epochs' order, if the data set was registered with ``shuffle=True``; default: the data set's.
            mode: ``dynamic``: ranks lease shards as they need them; ``deterministic``: the sequence of global batches is a function of
                seed, epoch and global batch size alone.
            tail: when an epoch runs out: ``empty`` or shorter batches; ``pad`` with samples given before; ``drop`` what makes no full
                batch for every rank (deterministic mode: no full global batch). What was padded or dropped is in the data state.
            window: of deterministic mode: so many samples are shuffled among each other; 0: all of the epoch's.
            prefetch: batches that are read ahead.
            prefetch_bytes: of these at most, and of shards kept for later ones as much again; default: 256 MiB.
            processes: that read; 0: a thread of this process does.
            start: of these processes: ``spawn`` or ``fork``.
            as_torch: columns as tensors, of the arrays' memory where torch can share it.
            on_new_version: where the lineage is in the middle of an epoch of an earlier version: ``next_epoch`` goes on with that version,
                and takes the current one when a run begins at an epoch's start; ``abandon_epoch`` begins the next epoch with the current
                version, with the rest of this one on record as dropped, and it counts among ``epochs``: the way on when a file was changed
                for good.

        Raises:
            DatasetNotFound, InvalidInput: there is no such data set; an argument is wrong; the run loads it in another way, or to its end.
            DataConflict: the restored data state is of another sequence.
            LedgerUnset: the run follows another, and :meth:`restore` was not called.
            RosterChanged: the run ended.
        """
        from dtr.datasets.plane import plane_of

        return plane_of(self._session).loader(
            self.datasets, name, batch_size=batch_size, global_batch_size=global_batch_size, epochs=epochs, columns=columns, seed=seed,
            mode=mode, tail=tail, window=window, prefetch=prefetch, prefetch_bytes=prefetch_bytes, processes=processes, start=start,
            as_torch=as_torch, on_new_version=on_new_version,
        )  # fmt: skip

    def evaluation(
        self,
        name: str,
        *,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        epochs: int = 1,
        columns: Sequence[str] | None = None,
        tail: str = "empty",
        prefetch: int = 8,
        prefetch_bytes: int | None = None,
        processes: int = 0,
        start: str = "spawn",
        as_torch: bool = False,
    ) -> Evaluation:
        """Passes over a data set beside the training: each ``for`` loop over it is the whole data set again, divided among the ranks.

        No part of the lineage: nothing is leased, nothing is saved, and its batches are not for :meth:`step`. The samples come in the
        order of the files, in as many batches on every rank. See :class:`dtr.datasets.loading.evaluation.Evaluation`.

        Args:
            name: as registered.
            batch_size: samples of each rank's batch; or
            global_batch_size: of all ranks' batches together.
            epochs: passes of one loop.
            columns, tail, prefetch, prefetch_bytes, processes, start, as_torch: as for :meth:`loader`.

        Raises:
            DatasetNotFound, InvalidInput: there is no such data set; an argument is wrong.
            RosterChanged: the run ended.
        """
        from dtr.datasets.plane import plane_of

        return plane_of(self._session).evaluation(
            self.datasets, name, batch_size=batch_size, global_batch_size=global_batch_size, epochs=epochs, columns=columns, tail=tail,
            prefetch=prefetch, prefetch_bytes=prefetch_bytes, processes=processes, start=start, as_torch=as_torch,
        )  # fmt: skip

    def replay(self, step: int, *, rank: int | None = None, columns: Sequence[str] | None = None) -> list[Batch]:
        """The batches that a step of the lineage consumed, again: read from the files, and not to be passed to :meth:`step`.

        Args:
            step: as :meth:`step` returned it.
            rank: whose; default: this process's rank.
            columns: to read; all if None.

        Raises:
            StepUnknown: neither Redis nor the store has a record of it.
            DatasetMismatch: a file is gone or was changed since; the message names it.
            CoordinatorUnavailable, StoreUnavailable.
        """
        from dtr.datasets.timemachine.history import history_of

        with history_of(settings=self.settings) as history:
            found = history.at(step, rank=self._session.run.rank if rank is None else rank)
        return [one.read(columns) for one in found.consumed]
