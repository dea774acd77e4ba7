"""What tests of whole jobs share: a folder as the store, an uploader, and a manager of a single process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dtr.checkpoint.manager import CheckpointManager
from dtr.config import Settings
from tests.uploading import Uploads, uploading


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where the job's checkpoints go."""
    return tmp_path / "store"


@pytest.fixture
def uploads(settings: Settings) -> Iterator[Uploads]:
    """An uploader of this host, which must meet nothing that it cannot cope with."""
    with uploading(settings) as running_uploads:
        yield running_uploads
    assert not running_uploads.failures


@pytest.fixture
def manager(settings: Settings, store: Path) -> Iterator[CheckpointManager]:
    """A process that saves and restores by itself."""
    with CheckpointManager(store, settings=settings) as made:
        yield made
