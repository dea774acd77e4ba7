"""The data sets of a job. Owns ``dataset:NAME``, its versions and its files' facts.

Guarantees: a name has one current version, and earlier ones stay readable; registering what is registered already changes nothing,
also when many processes do it at once; what cannot be true of the files is refused before anything is written; every rank of a run
gets its shards from one placement, in which each shard belongs to exactly one rank.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import redis

from dtr import names
from dtr.config import LauncherEnvironment, Settings
from dtr.datasets.formats import Format, make_format
from dtr.datasets.loading.shuffle import epoch_order
from dtr.datasets.registering.assignment import Assignment
from dtr.datasets.registering.counting import alone
from dtr.datasets.registering.declared import check_total, dataset_of, declare, is_registered
from dtr.datasets.registering.spec import Dataset, DatasetSpec, FileFacts, Shard, digest_of
from dtr.datasets.sources.copies import Copies
from dtr.datasets.sources.files import Found, find_files, measure_files
from dtr.errors import DatasetMismatch, DatasetNotFound, ForkedProcess, InvalidInput, StateCorrupt
from dtr.session import Session
from dtr.state.client import translate
from dtr.state.job import JobState

__all__ = ["DatasetRegistry"]

log = logging.getLogger(__name__)

_STAGED_S = 3600  # facts of files that nobody registered after all
_FILES_A_CALL = 500
_MAX_ATTEMPTS = 50

Shards = list[Shard]
Specs = list[DatasetSpec]


class DatasetRegistry:
    """Registers data sets and hands out their shards.

    In a process with a session (an agent) for the same server and job, shards are those of its run's placement, which all ranks
    share. Without one, ranks are mere numbers: `get_shard` takes ``worker_rank`` and ``world_size`` (default RANK and WORLD_SIZE,
    else 0 and 1), and every process that is told the same world size computes the same placement.

    Args:
        url: of the Redis server; default: the setting ``redis_url``.
        job: ``name`` or ``tenant/name``; default: the setting ``job``.
        client: another client to use, for tests on fakeredis.
        settings: where copies of files are kept, ``data_cache`` and ``data_cache_bytes``; default: as the environment says.
    """

    def __init__(
        self, url: str | None = None, *, job: str | None = None, client: redis.Redis | None = None, settings: Settings | None = None
    ) -> None:
        own = Settings.load(redis_url=url, job=job)
        self._url, self._job, self._copies = own.redis_url, own.job, Copies.of(settings or own)
        self._state = JobState(self._url, self._job, name="dtr-data", client=client)
        self._known: dict[str, Dataset] = {}
        self._counted: tuple[Found, Format, int, tuple[FileFacts, ...]] | None = None
        self._assignment = Assignment()
        self._session_pid: int | None = None

    def __repr__(self) -> str:
        return f"DatasetRegistry({self._state!r})"

    def close(self) -> None:
        """Close the connections; the next use opens others."""
        self._state.close()

    def register(
        self,
        name: str,
        *,
        path: str | os.PathLike[str],
        format: str,
        shard_size: int,
        total_samples: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        dtype: Any = None,
        sample_length: int | None = None,
        drop_remainder: bool = False,
    ) -> DatasetSpec:
        """Make a data set known to the job, and return its spec.

        The same again is a no-op, and cheap: files are counted only if one of them is new or changed, by one process of the job.
        Anything else under a known name is a new version. Reads every file of a ``jsonl`` or ``tar`` data set once, the others' sizes
        and headers only.

        Args:
            name: of the data set.
            path: a file; a folder, of which all files of the format count, in the order of their names, or those that its ``index.json``
                lists; a brace pattern such as ``train-{000..127}.tar``; or any of these in a store (``s3://bucket/prefix``). Compressed
                files (.gz, .zst) and those in a store are read through local copies (settings ``data_cache``, ``data_cache_bytes``).
            format: ``jsonl`` (an object a line), ``npy`` (a row a sample), ``bin`` (flat tokens), ``tar`` (WebDataset), ``mds`` (MosaicML
                Streaming) or ``parquet`` (needs ``pip install 'dtr[parquet]'``).
            shard_size: samples in a shard, the last one of each file excepted.
            total_samples: what the files must hold together; not checked if None.
            shuffle: whether each epoch takes the shards in another order, a function of seed and epoch (`dtr.datasets.loading.shuffle`).
            seed: from 0.
            dtype: of ``bin``: the type of one token.
            sample_length: of ``bin``: tokens in a sample.
            drop_remainder: of ``bin``: leave out the tokens after a file's last whole sample, which is an error otherwise.

        Raises:
            InvalidInput: an argument is wrong, or there is nothing at the path.
            DatasetMismatch: the files are damaged, or do not hold ``total_samples``.
            CoordinatorUnavailable: Redis cannot be reached.
        """
        described = make_format(format, dtype=dtype, sample_length=sample_length, drop_remainder=drop_remainder)
        declared = declare(name, described, total_samples=total_samples, shard_size=shard_size, shuffle=shuffle, seed=seed)
        found = find_files(path, described)
        current = self._current(name)
        if current is not None and is_registered(current, declared, found):
            check_total(declared, current.spec.total_samples, found)
            return current.spec
        with alone(self._state, name) as others_did:
            current = self._current(name) if others_did else None
            if current is not None and is_registered(current, declared, found):
                check_total(declared, current.spec.total_samples, found)
                return current.spec
            files = self._measured(found, described, declared.shard_size)
            check_total(declared, sum(facts.samples for facts in files), found)
            spec = self._install(dataset_of(declared, found, files, now_ms=self._state.server_now_ms())).spec
            self._counted = None
            return spec

    def _measured(self, found: Found, format: Format, shard_size: int) -> tuple[FileFacts, ...]:
        """Every file's facts; those that were counted and could not be registered, as Redis was away, are not counted again."""
        if self._counted is None or self._counted[:3] != (found, format, shard_size):
            self._counted = (found, format, shard_size, measure_files(found, format, shard_size, self._copies))
        return self._counted[3]

    def get(self, name: str, version: int | None = None) -> Dataset:
        """A data set with its files: the current version, or an earlier one.

        Raises:
            DatasetNotFound: there is no such data set, or no such version of it.
            StateCorrupt: what Redis holds of it is not whole.
            CoordinatorUnavailable: Redis cannot be reached.
        """
        names.name(name, "name")
        if version is not None:
            names.positive(version, "version")
            found = self._read(name, self._state.keys.dataset(name, version))
        else:
            found = self._current(name) or self._restored(name)
        if found is None:
            which = f"{name!r}" if version is None else f"{name!r} version {version}"
            known = ", ".join(spec.name for spec in self.list()) or "none"
            raise DatasetNotFound(f"job {self._job} has no data set {which}; it has: {known}. Register it with register().", name=name)
        return replace(found, copies=self._copies)

    def list(self) -> Specs:
        """The current spec of every data set, sorted by name. Raises CoordinatorUnavailable if Redis cannot be reached."""
        with translate(self._url):
            known: Any = sorted(self._state.redis.hkeys(self._state.keys.datasets))
            pipeline = self._state.redis.pipeline(transaction=False)
            for name in known:
                pipeline.hgetall(self._state.keys.dataset(name))
            return [DatasetSpec.from_fields(name, fields) for name, fields in zip(known, pipeline.execute(), strict=True)]

    def get_shard(self, name: str, worker_rank: int | None = None, epoch: int = 0, *, world_size: int | None = None) -> Shards:
        """The shards of one rank in the order in which this epoch takes them; none if there are more ranks than shards.

        In a run, waits until the run's placement is installed: a fraction of a second, once per run. Shards stay with their rank
        from epoch to epoch; with ``shuffle`` their order changes.

        Args:
            name: of the data set.
            worker_rank: whose shards; default: this process's rank.
            epoch: from 0.
            world_size: how many ranks share the data set, in a process without a run; default WORLD_SIZE, else 1.

        Raises:
            DatasetNotFound: there is no such data set.
            DatasetMismatch: a file of these shards changed since it was registered; the message names it.
            InvalidInput: a rank that is not in the run, or a wrong epoch.
            RosterChanged: the run ended.
            ForkedProcess: this is a child of the process that is in the run.
            CoordinatorUnavailable: Redis cannot be reached.
        """
        names.step(epoch, "epoch")
        dataset = self.get(name)
        spec = dataset.spec
        numbers = np.array(self._numbers(spec, worker_rank, world_size), dtype=np.int64)
        if spec.shuffle:
            turn = np.empty(spec.shards, dtype=np.int64)
            turn[epoch_order(spec.seed, epoch, spec.shards)] = np.arange(spec.shards)
            numbers = numbers[np.argsort(turn[numbers])]
        shards = [dataset.shard(number) for number in numbers.tolist()]
        for shard in {shard.file: shard for shard in shards}.values():
            shard.check_unchanged()
        return shards

    def _numbers(self, spec: DatasetSpec, worker_rank: int | None, world_size: int | None) -> Sequence[int]:
        session = self._session()
        if session is None:
            environment = LauncherEnvironment.load()
            size = names.positive(_first_given(world_size, environment.world_size, 1), "world_size", 100_000)
            rank = names.rank(_first_given(worker_rank, environment.rank, 0), size, "worker_rank")
            return self._assignment.alone(spec, rank, size)
        run = session.run
        if world_size not in (None, run.world_size):
            raise InvalidInput(
                f"world_size must be that of run {run.id}, {run.world_size}, or left out, got {world_size!r}", field="world_size"
            )
        rank = run.rank if worker_rank is None else names.rank(worker_rank, run.world_size, "worker_rank")
        return self._assignment.in_run(session, spec, run.worker_of(rank))

    def _session(self) -> Session | None:
        """This process's session; a child of a process that had one is refused, since it would compute another placement."""
        session = Session.current(self._url, self._job)
        if session is not None:
            self._session_pid = os.getpid()
        elif self._session_pid not in {None, os.getpid()}:
            raise ForkedProcess(
                f"process {os.getpid()} is a child of {self._session_pid}, which is in a run: get the shards there and hand them on"
            )
        return session

    # --- what Redis holds -------------------------------------------------------------------------------------------

    def _current(self, name: str) -> Dataset | None:
        found = self._read(name, self._state.keys.dataset(name))
        if found is not None:
            self._known[name] = found
        return found

    def _read(self, name: str, key: str) -> Dataset | None:
        """The data set under a key; its files' facts are fetched only if they are not those that are known here."""
        with translate(self._url):
            fields: Any = self._state.redis.hgetall(key)
        if not fields:
            return None
        spec = DatasetSpec.from_fields(name, fields)
        known = self._known.get(name)
        if known is not None and known.spec.digest == spec.digest:
            return Dataset(spec=spec, files=known.files)
        with translate(self._url):
            facts: Any = self._state.redis.hgetall(self._state.keys.dataset_files(name, spec.digest))
        files = tuple(FileFacts.from_text(file, text) for file, text in sorted(facts.items()))
        if spec.digest != digest_of(
            path=spec.path, format=spec.format, shard_size=spec.shard_size, shuffle=spec.shuffle, seed=spec.seed, files=files
        ):
            raise StateCorrupt(f"data set {name!r} version {spec.version}: its files in Redis are not those that were registered")
        return Dataset(spec=spec, files=files)

    def _restored(self, name: str) -> Dataset | None:
        """What this process knows of a data set that Redis has lost, written again; None if it knows nothing."""
        known = self._known.get(name)
        if known is None:
            return None
        log.warning("Redis lost data set %s of job %s: registering it again", name, self._job)
        return self._install(known)

    def put_back(self, dataset: Dataset) -> bool:
        """Make known what Redis has lost, as the version that it was; whether it did. A data set of this name that is there stays as it is.

        Raises CoordinatorUnavailable if Redis cannot be reached.
        """
        verdict, _ = self._offer(dataset.spec, 0)
        if verdict == "stage":
            self._stage(dataset)
            verdict, _ = self._offer(dataset.spec, 0)
        return verdict == "registered"

    def _offer(self, spec: DatasetSpec, current: int) -> tuple[str, int]:
        """The spec as the version after ``current``: what became of it, and the version that there is."""
        keys, name = self._state.keys, spec.name
        verdict, at = self._state.call(
            "dataset_register",
            [keys.dataset(name), keys.dataset(name, spec.version), keys.dataset_files(name, spec.digest), keys.datasets, keys.events],
            [name, spec.digest, current, spec.version, spec.files, *itertools.chain(*spec.to_fields().items())],
        )
        return str(verdict), int(at)

    def _install(self, dataset: Dataset) -> Dataset:
        """Write the data set as the next version, its own at least, unless it is the current one."""
        name = dataset.spec.name
        current = 0
        for _ in range(_MAX_ATTEMPTS):
            spec = replace(dataset.spec, version=max(current + 1, dataset.spec.version))
            verdict, at = self._offer(spec, current)
            if verdict in {"same", "registered"}:
                log.info("data set %s: version %s %s", name, at, verdict)
                self._known[name] = Dataset(spec=replace(spec, version=at), files=dataset.files)
                return self._known[name]
            current = at
            if verdict == "stage":
                self._stage(dataset)
        raise DatasetMismatch(f"data set {name!r}: other processes keep registering other specs under this name", name=name)

    def _stage(self, dataset: Dataset) -> None:
        key = self._state.keys.dataset_files(dataset.spec.name, dataset.spec.digest)
        for begin in range(0, len(dataset.files), _FILES_A_CALL):
            some = dataset.files[begin : begin + _FILES_A_CALL]
            facts = itertools.chain(*((one.file, one.to_text()) for one in some))
            self._state.call("dataset_stage", [key], [_STAGED_S, *facts])


def _first_given(*values: Any) -> Any:
    return next(value for value in values if value is not None)
