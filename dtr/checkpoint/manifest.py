"""What the store says of checkpoints and runs: the manifest that decides about one, and the record of what a run continues.

``encode`` writes only what ``parse`` accepts, and the same bytes for equal values, whoever writes them. ``parse`` takes nothing on
trust: every member is checked, and anything odd is a ManifestInvalid that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final, Literal, Self

from dtr import names
from dtr.checkpoint import checksum, records
from dtr.checkpoint.saving import metrics as metric_values
from dtr.checkpoint.saving.metrics import Metrics
from dtr.errors import InvalidInput, ManifestInvalid
from dtr.store.base import check_key

__all__ = ["Manifest", "PartFacts", "Replicated", "RunRecord"]

VERSION: Final = 1
MAX_RANKS: Final = 1_000_000
MAX_PART_BYTES: Final = 5 << 40  # the largest object of S3

Decision = Literal["commit", "abort", "tombstone"]
Replicated = Literal["none", "some", "all"]
Kind = Literal["file", "chunks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFacts:
    """One object of a checkpoint.

    Args:
        rank, worker, incarnation: who saved it.
        object: its key in the job's store.
        size_bytes, checksum: of that object, the checksum as ``checkpoint.checksum`` writes it.
        piece_bytes: the object as pieces of this size, the last one shorter; 0: nothing is known of pieces.
        pieces: the CRC64NVME of each piece, 16 hex digits each, one after the other: so a range can be verified alone.
        kind: ``file``: the object is the part's safetensors file; ``chunks``: it names the chunks that the file is put together from.
        state_bytes, state_checksum: of the part's safetensors file; for ``file`` they are the object's, and may be left out.
    """

    rank: int
    worker: str
    incarnation: str
    object: str
    size_bytes: int
    checksum: str
    piece_bytes: int = 0
    pieces: str = ""
    kind: Kind = "file"
    state_bytes: int = 0
    state_checksum: str = ""

    def __post_init__(self) -> None:
        records.integer(self.rank, "rank", 0, MAX_RANKS - 1)
        names.name(self.worker, "worker")
        records.incarnation(self.incarnation)
        check_key(self.object, "object")
        records.integer(self.size_bytes, "size_bytes", 1, MAX_PART_BYTES)
        _check_checksum(self.checksum, "checksum")
        self._check_pieces()
        if self.kind not in ("file", "chunks"):
            raise InvalidInput(f"kind must be file or chunks, got {str(self.kind)[:60]!r}", field="kind")
        self._check_state()

    def _check_state(self) -> None:
        """The file as it was staged, which for ``file`` is the object itself."""
        for name, own in (("state_bytes", self.size_bytes), ("state_checksum", self.checksum)):
            if self.kind == "file" and not getattr(self, name):
                object.__setattr__(self, name, own)
            if self.kind == "file" and getattr(self, name) != own:
                raise InvalidInput(f"{name} of a file must be that of the object, {own}, got {getattr(self, name)}", field=name)
        records.integer(self.state_bytes, "state_bytes", 1, MAX_PART_BYTES)
        _check_checksum(self.state_checksum, "state_checksum")

    def _check_pieces(self) -> None:
        records.integer(self.piece_bytes, "piece_bytes", 0, MAX_PART_BYTES)
        expected = -(-self.size_bytes // self.piece_bytes) if self.piece_bytes else 0
        if type(self.pieces) is not str or len(self.pieces) != 16 * expected or set(self.pieces) - set("0123456789abcdef"):
            raise InvalidInput(f"pieces must be {expected} checksums of 16 hex digits, got {str(self.pieces)[:60]!r}", field="pieces")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The one decision about the checkpoint of (run, step), or the tombstone that replaced it.

    Args:
        decision: ``commit``: its parts are the checkpoint; ``abort``: it never will be one; ``tombstone``: it was one.
        job: ``name`` or ``tenant/name``.
        run: whose.
        step: of training.
        world_size: ranks of the run.
        replicated: ``all``: one part for all ranks; ``none``: one part for each; ``some``: one part for each, which holds what is the
            rank's own and its share of what all ranks hold alike.
        parent: (run, step) that this run restored; None: it started anew.
        created_at: milliseconds since the epoch, by the coordinator's clock.
        parts: kept in order of rank.
        reason: for people; of an abort and a tombstone.
        data: the merged data state of the step, JSON.
        metrics: what its trainers said of it, name to number; None for one that was not finite.
    """

    decision: Decision
    job: str
    run: str
    step: int
    world_size: int
    replicated: Replicated
    parent: tuple[str, int] | None
    created_at: int
    parts: tuple[PartFacts, ...] = ()
    reason: str = ""
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    metrics: Metrics = field(default_factory=lambda: MappingProxyType({}))
    version: int = VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(sorted(self.parts, key=lambda part: part.rank)))
        object.__setattr__(self, "reason", records.clean_text(self.reason))
        if self.version != VERSION:
            raise InvalidInput(f"version must be {VERSION}, got {str(self.version)[:60]}", field="version")
        if self.decision not in ("commit", "abort", "tombstone"):  # a tuple: what came from a file may not be hashable
            raise InvalidInput(f"decision must be commit, abort or tombstone, got {str(self.decision)[:60]!r}", field="decision")
        names.job_name(self.job)
        _point(self.run, self.step)
        records.integer(self.world_size, "world_size", 1, MAX_RANKS)
        if self.replicated not in ("none", "some", "all"):
            raise InvalidInput(f"replicated must be none, some or all, got {str(self.replicated)[:60]!r}", field="replicated")
        if self.parent is not None:
            _point(*self.parent)
        records.moment_ms(self.created_at, "created_at")
        object.__setattr__(self, "metrics", MappingProxyType(metric_values.checked(self.metrics)))
        if self.decision != "commit" and not self.reason:
            raise InvalidInput(f"reason must say why: the decision is {self.decision}", field="reason")
        self._check_parts()

    @property
    def fate(self) -> str:
        """The decision in words: ``was retired``."""
        return {"commit": "is committed", "abort": "was aborted", "tombstone": "was retired"}[self.decision]

    def _check_parts(self) -> None:
        ranks = [part.rank for part in self.parts]
        if len({part.object for part in self.parts}) != len(ranks):
            raise InvalidInput("parts must be different objects, two entries name the same", field="parts")
        if len(set(ranks)) != len(ranks) or (ranks and ranks[-1] >= self.world_size):
            raise InvalidInput(f"parts must be of different ranks below {self.world_size}, got {str(ranks)[:80]}", field="parts")
        expected = 1 if self.replicated == "all" else self.world_size
        if self.decision == "commit" and len(ranks) != expected:
            raise InvalidInput(f"parts of this commit must be {expected}, got {len(ranks)}", field="parts")

    def encode(self) -> bytes:
        """The record's bytes, with its own checksum."""
        record = {name.name: getattr(self, name.name) for name in fields(self)}
        record["parts"] = [{name.name: getattr(part, name.name) for name in fields(part)} for part in self.parts]
        record["parent"] = None if self.parent is None else {"run": self.parent[0], "step": self.parent[1]}
        return records.encode({**record, "data": dict(self.data), "metrics": dict(self.metrics)})

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """The manifest that ``encode`` wrote; ManifestInvalid for anything else."""
        record = records.decode(content, "the manifest")
        _check_version(record, "the manifest")
        records.members(record, {name.name for name in fields(cls)}, "the manifest")
        if type(record["parts"]) is not list or type(record["reason"]) is not str:
            raise ManifestInvalid("the manifest's parts must be a list and its reason text")
        if type(record["data"]) is not dict or type(record["metrics"]) is not dict:
            raise ManifestInvalid("the manifest's data and metrics must be objects")
        try:
            parts = tuple(_part(part) for part in record.pop("parts"))
            return cls(parts=parts, parent=_parent(record.pop("parent")), **record)
        except InvalidInput as exc:
            raise ManifestInvalid(f"the manifest: {exc.message}", field=exc.facts.get("field")) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run continues, written into the store before any of its ranks trains.

    Args:
        job: ``name`` or ``tenant/name``.
        run: whose record it is.
        parent_run, parent_step: the checkpoint that it restored; None: it started anew.
        world_size: ranks of the run.
        roster: worker -> ``RANK INCARNATION HOST``, one for each rank.
        store: the store's URL, without secrets.
        created_at: milliseconds since the epoch, by the coordinator's clock.
    """

    job: str
    run: str
    parent_run: str | None
    parent_step: int | None
    world_size: int
    roster: Mapping[str, str]
    store: str
    created_at: int
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise InvalidInput(f"version must be {VERSION}, got {str(self.version)[:60]}", field="version")
        names.job_name(self.job)
        names.name(self.run, "run")
        if (self.parent_run is None) != (self.parent_step is None):
            raise InvalidInput("parent_run and parent_step must be given together", field="parent_run")
        if self.parent_run is not None:
            _point(self.parent_run, self.parent_step)
        records.integer(self.world_size, "world_size", 1, MAX_RANKS)
        ranks = sorted(_seat(worker, seat) for worker, seat in self.roster.items())
        if ranks != list(range(self.world_size)):
            raise InvalidInput(f"roster must have the ranks 0 to {self.world_size - 1}, got {str(ranks)[:80]}", field="roster")
        records.text(self.store, "store")
        records.moment_ms(self.created_at, "created_at")

    def encode(self) -> bytes:
        """The record's bytes, with its own checksum."""
        record = {name.name: getattr(self, name.name) for name in fields(self)}
        return records.encode({**record, "roster": dict(self.roster)})

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """The record that ``encode`` wrote; ManifestInvalid for anything else."""
        record = records.decode(content, "the run's record")
        _check_version(record, "the run's record")
        records.members(record, {name.name for name in fields(cls)}, "the run's record")
        if type(record["roster"]) is not dict:
            raise ManifestInvalid("the run's roster must be an object")
        try:
            return cls(**record)
        except InvalidInput as exc:
            raise ManifestInvalid(f"the run's record: {exc.message}", field=exc.facts.get("field")) from exc


def _check_version(record: dict[str, Any], what: str) -> None:
    """First of all: a later version may have other members."""
    version = record.get("version")
    if type(version) is not int or version != VERSION:
        raise ManifestInvalid(f"{what} has the unknown version {str(version)[:60]}; this dtr reads {VERSION}", field="version")


def _check_checksum(value: Any, field: str) -> None:
    if not checksum.is_checksum(value):
        raise InvalidInput(f"{field} must be crc64nvme: and 16 hex digits, got {str(value)[:60]!r}", field=field)


def _part(record: Any) -> PartFacts:
    return PartFacts(**records.members(record, {name.name for name in fields(PartFacts)}, "a part of the manifest"))


def _parent(record: Any) -> tuple[str, int] | None:
    if record is None:
        return None
    point = records.members(record, {"run", "step"}, "the manifest's parent")
    return point["run"], point["step"]


def _point(run: Any, step: Any) -> None:
    names.name(run, "run")
    records.integer(step, "step", 0, names.MAX_STEP)


def _seat(worker: str, seat: Any) -> int:
    """The rank of a roster's entry."""
    names.name(worker, "worker")
    words = seat.split(" ") if type(seat) is str else []
    if len(words) != 3 or not words[0].isascii() or not words[0].isdigit() or len(words[0]) > 7 or not words[2]:
        raise InvalidInput(f"roster must map a worker to 'RANK INCARNATION HOST', got {str(seat)[:60]!r}", field="roster")
    records.incarnation(words[1])
    records.text(words[2], "host")
    return int(words[0])
