"""A data set as an object in the job's store, so that who reads its history needs no Redis: its spec and its files' facts. Pure.

Written with the first commit whose steps consumed it, named by its digest, and never changed: equal digests mean the same data.
"""

from __future__ import annotations

import gzip

import orjson

from dtr.datasets.registering.spec import Dataset, DatasetSpec, FileFacts, digest_of
from dtr.errors import DtrError, StateCorrupt

__all__ = ["decode", "encode", "key_of"]


def key_of(name: str, digest: str) -> str:
    """Where it lies in the job's store."""
    return f"datasets/{name}/{digest}.json.gz"


def encode(dataset: Dataset) -> bytes:
    """The object: JSON, compressed."""
    files = {facts.file: facts.to_text() for facts in dataset.files}
    return gzip.compress(orjson.dumps({"name": dataset.spec.name, "spec": dataset.spec.to_fields(), "files": files}), mtime=0)


def decode(content: bytes, name: str, digest: str) -> Dataset:
    """What `encode` wrote; raises StateCorrupt, also if it is another data set than its key says."""
    what = key_of(name, digest)
    try:
        document = orjson.loads(gzip.decompress(content))
        spec = DatasetSpec.from_fields(name, document["spec"])
        files = tuple(FileFacts.from_text(file, text) for file, text in sorted(document["files"].items()))
        found = Dataset(spec=spec, files=files)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, DtrError) as exc:
        raise StateCorrupt(f"{what} is no data set: {type(exc).__name__}: {exc}") from exc
    held = digest_of(path=spec.path, format=spec.format, shard_size=spec.shard_size, shuffle=spec.shuffle, seed=spec.seed, files=files)
    if (held, spec.digest) != (digest, digest):
        raise StateCorrupt(f"{what} holds another data set than its name says: {held}")
    return found
