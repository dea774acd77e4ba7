"""A checkpoint as a folder that needs no dtr: what ``dtr ckpt export`` writes and ``dtr ckpt import`` takes.

    FOLDER/checkpoint.json           what it is: job, run, step, ranks, metrics, each file with its size and checksum
    FOLDER/rank-00000.safetensors    what rank 0 saved: its tensors by their paths (``model/layers/0/weight``)
    FOLDER/rank-00000.tree.json      the structure around them, and every value that is no tensor

``parse`` takes nothing on trust: the folder may come from anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Self

from dtr.checkpoint import records
from dtr.checkpoint.manifest import Manifest, PartFacts, Replicated
from dtr.checkpoint.saving.metrics import Metrics
from dtr.errors import InvalidInput, ManifestInvalid

__all__ = ["ABOUT", "Exported", "ExportedFile", "file_name", "tree_name"]

ABOUT: Final = "checkpoint.json"
FORMAT: Final = "dtr-checkpoint"
VERSION: Final = 1
_FILE: Final = re.compile(r"rank-(\d{5,7})\.safetensors", re.ASCII)
READ_ME: Final = (
    "Each rank-N.safetensors opens with any safetensors library (safetensors.numpy.load_file, or safetensors.torch for bfloat16 "
    "and float8, which numpy lacks); what safetensors has no dtype for is there as bytes. Tensors are named by their paths in the "
    "state. rank-N.tree.json has the structure and the values that are no tensors, as the tree module of dtr describes. Where "
    "'replicated' is 'some', the rows of a common tensor are spread over the ranks: the metadata entry 'dtr_replicated' of each file "
    "says which."
)


def file_name(rank: int) -> str:
    """Where the tensors of a rank are."""
    return f"rank-{rank:05d}.safetensors"


def tree_name(rank: int) -> str:
    """Where the structure around them is."""
    return f"rank-{rank:05d}.tree.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """One rank's file; the checksums are as in a manifest."""

    file: str
    rank: int
    worker: str
    incarnation: str
    size_bytes: int
    checksum: str
    piece_bytes: int
    pieces: str

    def __post_init__(self) -> None:
        match = _FILE.fullmatch(self.file) if isinstance(self.file, str) else None
        if match is None or int(match[1]) != self.rank:
            raise InvalidInput(f"file of rank {str(self.rank)[:20]} must be rank-N.safetensors, got {str(self.file)[:60]!r}", field="file")
        self.facts("runs/x")  # checks the rest

    def facts(self, object: str) -> PartFacts:
        """The same as a part of a checkpoint."""
        return PartFacts(
            rank=self.rank, worker=self.worker, incarnation=self.incarnation, object=object, size_bytes=self.size_bytes,
            checksum=self.checksum, piece_bytes=self.piece_bytes, pieces=self.pieces,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What ``checkpoint.json`` says."""

    job: str
    run: str
    step: int
    world_size: int
    replicated: Replicated
    created_at: int
    files: tuple[ExportedFile, ...]
    metrics: Metrics = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.manifest([one.facts(f"runs/{one.file}") for one in self.files], run=self.run, created_at=self.created_at, reason="")

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one in self.files)

    def manifest(self, parts: list[PartFacts], *, run: str, created_at: int, reason: str, job: str | None = None) -> Manifest:
        """The commit of these files under ``run``; raises InvalidInput if they make none."""
        return Manifest(
            decision="commit", job=self.job if job is None else job, run=run, step=self.step, world_size=self.world_size,
            replicated=self.replicated, parent=None, created_at=created_at, parts=tuple(parts), reason=reason, metrics=self.metrics,
            data=self.data,
        )  # fmt: skip

    def encode(self) -> bytes:
        """``checkpoint.json``, for people to read."""
        document = {"format": FORMAT, "version": VERSION, "read_me": READ_ME} | {one.name: getattr(self, one.name) for one in fields(self)}
        document["files"] = [{one.name: getattr(file, one.name) for one in fields(file)} for file in self.files]
        document |= {"metrics": dict(self.metrics), "data": dict(self.data)}
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """What ``encode`` wrote; ManifestInvalid for anything else."""
        document = _document(content)
        if (document.pop("format", None), document.pop("version", None)) != (FORMAT, VERSION):
            raise ManifestInvalid(f"{ABOUT} is not of format {FORMAT} version {VERSION}", field="version")
        document.pop("read_me", None)
        records.members(document, {one.name for one in fields(cls)}, ABOUT)
        if type(document["files"]) is not list or type(document["metrics"]) is not dict or type(document["data"]) is not dict:
            raise ManifestInvalid(f"{ABOUT}: files must be a list, metrics and data objects")
        try:
            wanted = {one.name for one in fields(ExportedFile)}
            files = tuple(ExportedFile(**records.members(file, wanted, f"a file of {ABOUT}")) for file in document.pop("files"))
            return cls(files=files, **document)
        except InvalidInput as exc:
            raise ManifestInvalid(f"{ABOUT}: {exc.message}", field=exc.facts.get("field")) from exc


def _document(content: bytes) -> dict[str, Any]:
    if len(content) > records.MAX_BYTES:
        raise ManifestInvalid(f"{ABOUT} has more than {records.MAX_BYTES} bytes")
    try:
        document = json.loads(content.decode())
    except (ValueError, RecursionError) as exc:
        raise ManifestInvalid(f"{ABOUT} is truncated or not JSON: {exc}") from exc
    if type(document) is not dict:
        raise ManifestInvalid(f"{ABOUT} must be an object, got a {type(document).__name__}")
    return document
