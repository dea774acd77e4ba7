"""Delta asks of a store what its contract promises, and no more: the same on a folder, S3, Google Cloud Storage and Azure."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtr.checkpoint.delta import chunks as chunk_format
from dtr.checkpoint.delta.collection import collect_chunks
from dtr.store import open_store
from tests.chunked import CHUNK_BYTES, Chunked, same, uploading, weights
from tests.servers import RedisServer
from tests.uploads import outcome

SERVERS = {"s3": ("seaweed", "s3_credentials"), "gs": ("fake_gcs", "google_credentials"), "az": ("azurite", "azure_credentials")}
CHANGED = 3  # chunks of a state of which two tensors of twelve change, and the small ones, which are one together


@pytest.fixture(params=["file", *SERVERS])
def training(
    request: pytest.FixtureRequest, valkey: RedisServer, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """A job of one rank whose saves ask for delta, in a store of each kind."""
    monkeypatch.setitem(chunk_format.cut.__kwdefaults__, "chunk_bytes", CHUNK_BYTES)
    made = Chunked(valkey.url, job, tmp_path)
    if request.param in SERVERS:
        server, credentials = (request.getfixturevalue(name) for name in SERVERS[request.param])
        assert credentials is None
        made.store_url = server.url("delta")
        made.store = open_store(made.store_url).child(job)
        made.state.redis.hset(made.state.keys.run(made.run.id), "store", made.store_url)
    yield made
    made.close()


def test_a_save_sends_what_is_new(training: Chunked) -> None:
    """Of a state of which a sixth changes, each save stores that alone; each restores by itself, also when the others are gone."""
    training.commit_state(1, weights(1, frozen=10))
    first = training.chunks()
    training.commit_state(2, weights(2, frozen=10))
    assert len(training.chunks() - first) == CHANGED < len(first) / 4
    assert training.named(2) <= training.chunks()
    for step in (1, 2):
        assert same(training.restored(step), weights(step, frozen=10))
    training.retire(1)
    assert collect_chunks(training.store).deleted
    assert training.chunks() == training.named(2)
    assert training.condemned() == []
    assert same(training.restored(2), weights(2, frozen=10))


def test_a_killed_upload_is_gone_on_with(training: Chunked) -> None:
    """SIGKILL between two chunks: the next uploader commits, and what no commit names is collected, nothing else."""
    training.commit_state(1, weights(1, frozen=6))
    training.stage_state(2, weights(2, frozen=6))
    assert outcome(uploading(training, 2, fault="delta.mid_send=kill"))[0] == -signal.SIGKILL
    assert training.settled(2) == "COMMITTED"
    collect_chunks(training.store)
    assert training.chunks() == training.named(1) | training.named(2)
    assert len(training.recipes()) == 2
    for step in (1, 2):
        assert same(training.restored(step), weights(step, frozen=6))
